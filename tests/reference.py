"""The Transformer once more, in NumPy float64, one position after the other.

Written from the papers for the tests to compare with, and for no speed: attention is computed for
each query over the keys it may see, a sentence at a time, so there are no masks to get wrong.
Parameters are a dict of arrays by name, as `jaxformer.trees.flatten` gives them.
"""

from __future__ import annotations

import math

import numpy as np

NORM_EPSILON = 1e-6

Parameters = dict[str, np.ndarray]


# Attention -----------------------------------------------------------------------------------


def allowed_pairs(T, S, q_segments_T=None, kv_segments_S=None, causal=False, window=None):
    """Which (query, key) pairs of one row may meet: bool [T, S]."""
    allowed_TS = np.zeros((T, S), bool)
    for t in range(T):
        for s in range(S):
            same = q_segments_T is None or (
                q_segments_T[t] == kv_segments_S[s] and q_segments_T[t] != 0
            )
            past = not causal or s <= t
            near = window is None or abs(t - s) < window
            allowed_TS[t, s] = same and past and near
    return allowed_TS


def softmax(scores_S):
    e = np.exp(scores_S - scores_S.max())
    return e / e.sum()


def raw_scores(q_K, k_SK, places, bias_S=0.0, slope=0.0, cap=None):
    """The scores of one query for keys at the given distances, and their slope in q k / sqrt(K)."""
    scores = k_SK @ q_K / math.sqrt(len(q_K))
    slopes = np.ones(len(scores))
    if cap is not None:
        slopes = 1 / np.cosh(scores / cap) ** 2
        scores = cap * np.tanh(scores / cap)
    return scores + bias_S - slope * abs(places), slopes


def attention(q_THK, k_SGK, v_SGK, allowed_TS, bias_HTS=None, factor_HTS=None, **more):
    """softmax(q k / sqrt(K) + bias) v for one row: [T, H, K]."""
    return attention_with_lse(q_THK, k_SGK, v_SGK, allowed_TS, bias_HTS, factor_HTS, **more)[0]


def attention_with_lse(
    q_THK,
    k_SGK,
    v_SGK,
    allowed_TS,
    bias_HTS=None,
    factor_HTS=None,
    slopes_H=None,
    cap=None,
):
    """Also the log-sum-exp [H, T], -1e30 for what sees nothing.

    `factor_HTS` multiplies the weights after the softmax (dropout: 0 or 1 / (1 - rate)).
    """
    T, H, K = q_THK.shape
    out_THK, lse_HT = np.zeros((T, H, K)), np.full((H, T), -1e30)
    for h, t, seen, g in visible(q_THK, k_SGK, allowed_TS):
        bias = 0.0 if bias_HTS is None else bias_HTS[h, t, seen]
        slope = 0.0 if slopes_H is None else slopes_H[h]
        scores, _ = raw_scores(q_THK[t, h], k_SGK[seen, g], t - seen, bias, slope, cap)
        weights = softmax(scores)
        lse_HT[h, t] = scores.max() + math.log(np.exp(scores - scores.max()).sum())
        if factor_HTS is not None:
            weights = weights * factor_HTS[h, t, seen]
        out_THK[t, h] = weights @ v_SGK[seen, g]
    return out_THK, lse_HT


def visible(q_THK, k_SGK, allowed_TS):
    """Each (head, query) that sees something, what it sees, and the head of its keys."""
    T, H, _ = q_THK.shape
    for h in range(H):
        for t in range(T):
            seen = np.flatnonzero(allowed_TS[t])
            if len(seen):
                yield h, t, seen, h // (H // k_SGK.shape[1])


def attention_gradients(
    q_THK,
    k_SGK,
    v_SGK,
    allowed_TS,
    out_THK,
    bias_HTS=None,
    factor_HTS=None,
    slopes_H=None,
    cap=None,
    lse_HT=None,
):
    """Gradients of sum(out_THK * attention(...)) + sum(lse_HT * its log-sum-exp).

    For q, k, v and the bias.
    """
    K = q_THK.shape[-1]
    q_grad, k_grad, v_grad = np.zeros(q_THK.shape), np.zeros(k_SGK.shape), np.zeros(v_SGK.shape)
    bias_grad = np.zeros((q_THK.shape[1], *allowed_TS.shape))
    for h, t, seen, g in visible(q_THK, k_SGK, allowed_TS):
        bias = 0.0 if bias_HTS is None else bias_HTS[h, t, seen]
        slope = 0.0 if slopes_H is None else slopes_H[h]
        scores, slopes = raw_scores(q_THK[t, h], k_SGK[seen, g], t - seen, bias, slope, cap)
        weights = softmax(scores)
        factor = np.ones(len(seen)) if factor_HTS is None else factor_HTS[h, t, seen]
        v_grad[seen, g] += np.outer(weights * factor, out_THK[t, h])
        weight_grad = (v_SGK[seen, g] @ out_THK[t, h]) * factor
        jacobian = np.diag(weights) - np.outer(weights, weights)
        score_grad = jacobian @ weight_grad
        if lse_HT is not None:
            score_grad = score_grad + lse_HT[h, t] * weights
        bias_grad[h, t, seen] = score_grad
        score_grad = score_grad * slopes
        q_grad[t, h] = score_grad @ k_SGK[seen, g] / math.sqrt(K)
        k_grad[seen, g] += np.outer(score_grad, q_THK[t, h]) / math.sqrt(K)
    return q_grad, k_grad, v_grad, bias_grad


# Parts of a layer -----------------------------------------------------------------------------


def part(p: Parameters, name: str) -> Parameters:
    """The parameters below a name, with shorter names."""
    return {key[len(name) + 1 :]: value for key, value in p.items() if key.startswith(name + "/")}


def norm(p: Parameters, x_TD):
    """LayerNorm where there is a bias, RMSNorm where there is none."""
    out = np.zeros_like(x_TD)
    for t, x in enumerate(x_TD):
        if "bias_D" in p:
            out[t] = (x - x.mean()) / math.sqrt(x.var() + NORM_EPSILON) * p["scale_D"] + p["bias_D"]
        else:
            out[t] = x / math.sqrt((x * x).mean() + NORM_EPSILON) * p["scale_D"]
    return out


def sinusoidal(position: int, d_model: int):
    wave = np.zeros(d_model)
    for i in range(d_model // 2):
        wave[2 * i] = math.sin(position / 10000 ** (2 * i / d_model))
        wave[2 * i + 1] = math.cos(position / 10000 ** (2 * i / d_model))
    return wave


def rotated(x_K, position: int):
    """Each pair (i, i + K/2), taken as a complex number, turned by position / 10000^(2i/K)."""
    half = len(x_K) // 2
    turn = np.exp(1j * position / 10000.0 ** (2 * np.arange(half) / len(x_K)))
    z = (x_K[:half] + 1j * x_K[half:]) * turn
    return np.concatenate([z.real, z.imag])


def heads(p: Parameters, name: str, letter: str, x_TD):
    """x W + b for every head: [T, heads, K]."""
    kernel = p[f"{name}_D{letter}K"]
    out = np.zeros((len(x_TD), *kernel.shape[1:]))
    for h in range(kernel.shape[1]):
        out[:, h] = x_TD @ kernel[:, h]
        if f"{name}_bias_{letter}K" in p:
            out[:, h] += p[f"{name}_bias_{letter}K"][h]
    return out


def multi_head(p: Parameters, config, x_TD, memory_SD, allowed_TS, positions_T=None):
    """`positions_T` is given for self-attention, which alone knows rotary positions."""
    q = heads(p, "query", "H", x_TD)
    k = heads(p, "key", "G", memory_SD)
    v = heads(p, "value", "G", memory_SD)
    if config.positions == "rotary" and positions_T is not None:
        for array in (q, k):
            for t, position in enumerate(positions_T):
                for h in range(array.shape[1]):
                    array[t, h] = rotated(array[t, h], position)
    mixed = attention(q, k, v, allowed_TS)
    out = sum(mixed[:, h] @ p["output_HKD"][h] for h in range(q.shape[1]))
    return out + p.get("output_bias_D", 0.0)


def activation(name: str, x):
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu":  # the tanh form of Hendrycks & Gimpel (2016)
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-x))  # the swish of swiglu


def feed_forward(p: Parameters, config, x_TD):
    hidden = x_TD @ p["up_DF"] + p.get("up_bias_F", 0.0)
    if config.activation == "swiglu":
        hidden = hidden * activation("swiglu", x_TD @ p["gate_DF"])
    else:
        hidden = activation(config.activation, hidden)
    return hidden @ p["down_FD"] + p.get("down_bias_D", 0.0)


def stack(p: Parameters, config, x_TD, allowed_TT, positions_T, memory=None):
    """All layers of an encoder or decoder over one row; `memory` is (memory_SD, allowed_TS)."""
    blocks = part(p, "blocks")
    for layer in range(len(next(iter(blocks.values())))):
        one = {name: value[layer] for name, value in blocks.items()}
        sublayers = [
            ("self_attention", lambda q, x: multi_head(q, config, x, x, allowed_TT, positions_T))
        ]
        if memory is not None:
            sublayers.append(
                ("cross_attention", lambda q, x: multi_head(q, config, x, memory[0], memory[1]))
            )
        sublayers.append(("feed_forward", lambda q, x: feed_forward(q, config, x)))
        for name, f in sublayers:
            if config.norm_position == "post":
                x_TD = norm(part(one, f"{name}_norm"), x_TD + f(part(one, name), x_TD))
            else:
                x_TD = x_TD + f(part(one, name), norm(part(one, f"{name}_norm"), x_TD))
    return norm(part(p, "norm"), x_TD) if config.norm_position == "pre" else x_TD


# The whole model -------------------------------------------------------------------------------


def embed(table_VD, position_table_TD, config, tokens_T, positions_T):
    x_TD = np.zeros((len(tokens_T), config.d_model))
    for t, (token, position) in enumerate(zip(tokens_T, positions_T, strict=True)):
        x_TD[t] = table_VD[token] * math.sqrt(config.d_model)
        if config.positions == "sinusoidal":
            x_TD[t] += sinusoidal(position, config.d_model)
        elif config.positions == "learned":
            x_TD[t] += position_table_TD[position]
    return x_TD


def sentence_logits(p: Parameters, config, source_S, inputs_T):
    """The logits of one sentence pair that stands alone, without padding: [T, V]."""
    p = {name: np.asarray(value, np.float64) for name, value in p.items()}
    S, T = len(source_S), len(inputs_T)
    target_table = p.get("target_embedding_VD", p["embedding_VD"])
    x_SD = embed(p["embedding_VD"], p.get("source_positions_TD"), config, source_S, np.arange(S))
    memory_SD = stack(part(p, "encoder"), config, x_SD, allowed_pairs(S, S), np.arange(S))
    x_TD = embed(target_table, p.get("target_positions_TD"), config, inputs_T, np.arange(T))
    memory = (memory_SD, allowed_pairs(T, S))
    x_TD = stack(
        part(p, "decoder"), config, x_TD, allowed_pairs(T, T, causal=True), np.arange(T), memory
    )
    return x_TD @ p.get("output_VD", target_table).T


# Training ----------------------------------------------------------------------------------------


def cross_entropy(logits_NV, targets_N, weights_N, smoothing):
    """Sums over tokens of the smoothed loss, the plain one, and the right guesses."""
    loss = nll = correct = 0.0
    for logits, target, weight in zip(np.float64(logits_NV), targets_N, weights_N, strict=True):
        log_p = logits - logits.max()
        log_p = log_p - math.log(np.exp(log_p).sum())
        wanted = np.full(len(logits), smoothing / len(logits))
        wanted[target] += 1 - smoothing
        loss -= weight * (wanted * log_p).sum()
        nll -= weight * log_p[target]
        correct += weight * (logits[target] == logits.max())
    return {"loss": loss, "nll": nll, "correct": correct, "count": float(np.sum(weights_N))}


def adam(parameter, gradient, moment, square, n, rate, beta1=0.9, beta2=0.98, epsilon=1e-9):
    """Update number n = 1, 2, ... of Kingma & Ba (2015), algorithm 1."""
    moment = beta1 * moment + (1 - beta1) * gradient
    square = beta2 * square + (1 - beta2) * gradient**2
    step = moment / (1 - beta1**n) / (np.sqrt(square / (1 - beta2**n)) + epsilon)
    return parameter - rate * step, moment, square
