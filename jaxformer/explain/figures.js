"use strict";
// The figures: what each shows, and the function of the model that computed its numbers.
const square = (map, rows, columns, room, more = {}) => {
  const svg = canvas(), cell = fit(room, rows, columns.length);
  const size = heat(svg, map, { rows, columns, cell, tall: Math.min(cell, 30), mark: marked(), ...more });
  return sized(svg, size.width, size.height);
};
const marked = () => (state.stack === "encoder" ? undefined : state.step);
const attentionMap = (value, more = {}) => ({
  draw: (run, room) => square(value(run), queries(state.stack), keys(state.stack), room, more),
  differ: (a, b, room) => square(minus(value(b), value(a)), queries(state.stack), keys(state.stack), room, { signed: true, ...(more.top ? { top: more.top } : {}) }),
});
const SIDES = () => STACKS[state.stack].side;
const sideTokens = () => (SIDES() === "encoder" ? source() : inputs());
function vectors(parts, rowsOf, room) {
  const svg = canvas(), left = Math.max(...parts.flatMap((_, i) => rowsOf(i).map(text => width(text)))) + 10;
  let y = 0, wide = 0;
  parts.forEach(([title, map], i) => {
    const cell = Math.max(1.5, Math.min(9, (room - left - 8) / map[0].length));
    const size = heat(svg, map, { rows: rowsOf(i), left, title, cell, tall: rowsOf(i).length > 24 ? 11 : 16, signed: true, y });
    y += size.height + 8; wide = Math.max(wide, size.width);
  });
  return sized(svg, wide, y);
}
const FIGURES = {
  embeddings: {
    section: ["Words become vectors", "词变成向量", "Each token is looked up in a table; its place in the sentence is told by positions.", "每个词元在表中查得一个向量，位置编码告诉模型它在句中的位置。"],
    title: ["Embeddings + positions", "词嵌入 + 位置"], by: "jaxformer.model.transformer.embed",
    caption: () => (walk.model.positions === "rotary"
      ? ["Each row is a token, each column a feature (blue above zero, orange below). This model adds no positions: it turns queries and keys instead (RoPE).", "每行一个词元，每列一个特征（蓝为正，橙为负）。此模型不在这里加位置，而是旋转查询与键（RoPE）。"]
      : ["Each row is a token, each column a feature (blue above zero, orange below): the embedding, the position, and their sum, which enters the first layer.", "每行一个词元，每列一个特征（蓝为正，橙为负）：词嵌入、位置、二者之和；和进入第一层。"]),
    draw(run, room) {
      const side = run[SIDES()];
      const parts = [[say("embedding × √d_model", "词嵌入 × √d_model"), side.embedding_TD], [say("+ position", "+ 位置"), minus(side.input_TD, side.embedding_TD)], [say("= input of layer 1", "= 第 1 层的输入"), side.input_TD]];
      return vectors(walk.model.positions === "rotary" ? parts.slice(0, 1) : parts, sideTokens, room);
    },
  },
  cross_attention: {
    section: ["Who looks at whom", "谁在看谁", "Pick attention, layer and head above; every figure here follows.", "在上方选择注意力、层与头，这里的图都会随之变化。"],
    title: ["Cross-attention: the alignment", "交叉注意力：对齐"], by: "jaxformer.attention.reference.softmax",
    caption: () => ["Each row is the output token being written; dark cells are the source tokens that the decoder reads to write it.", "每行是正在写出的词元；深色格子是解码器此时所读的源词元。"],
    draw: (run, room) => square(picked(sublayer(run, "cross", crossLayer()).weights_HTS), walk.target.outputs, source(), room, { top: 1, mark: state.step }),
    differ: (a, b, room) => square(minus(picked(sublayer(b, "cross", crossLayer()).weights_HTS), picked(sublayer(a, "cross", crossLayer()).weights_HTS)), walk.target.outputs, source(), room, { top: 1, signed: true, mark: state.step }),
  },
  lines: {
    title: ["Attention as lines between words", "词与词之间的连线"], by: "jaxformer.attention.reference.softmax",
    caption: () => ["The thicker the line, the more the left token takes from the right one; orange is the current step.", "线越粗，左边词元从右边取得越多；橙色为当前步。"],
    draw(run) {
      const weights = picked(sublayer(run).weights_HTS), rows = queries(state.stack), columns = keys(state.stack), svg = canvas();
      const tall = Math.max(15, Math.min(30, 420 / Math.max(rows.length, columns.length)));
      const left = Math.max(...rows.map(text => width(text, 13))) + 14, gap = 190, shift = (columns.length - rows.length) * tall / 2;
      const y = t => 16 + t * tall + Math.max(0, shift), z = s => 16 + s * tall + Math.max(0, -shift);
      weights.forEach((row, t) => row.forEach((x, s) => {
        if (x < 0.04) return;
        const here = marked() === t;
        node("path", { d: `M${left} ${y(t)}C${left + gap / 2} ${y(t)} ${left + gap / 2} ${z(s)} ${left + gap} ${z(s)}`, fill: "none", stroke: here ? ORANGE : BLUE, "stroke-width": 0.6 + 6 * x, "stroke-opacity": here ? 0.35 + 0.6 * x : 0.08 + 0.5 * x, "stroke-linecap": "round" }, svg);
      }));
      rows.forEach((text, t) => write(svg, left - 8, y(t) + 4, text, { "text-anchor": "end", "font-size": 13, ...(marked() === t ? { "font-weight": 700, fill: ORANGE } : {}) }));
      columns.forEach((text, s) => write(svg, left + gap + 8, z(s) + 4, text, { "font-size": 13 }));
      return sized(svg, left + gap + 16 + Math.max(...columns.map(text => width(text, 13))), Math.max(rows.length, columns.length) * tall + 8);
    },
  },
  qkv: {
    title: ["Queries, keys, values", "查询、键、值 (Q, K, V)"], by: "jaxformer.model.layers.Attention.queries, keys_values",
    caption: () => ["What each token asks for (Q), what it can be found by (K), and what it hands over (V): three projections of the same stream.", "每个词元问什么 (Q)、凭什么被找到 (K)、交出什么 (V)：三个线性投影。"],
    draw(run, room) {
      const part = sublayer(run), head = Math.max(0, state.head), name = say("head", "头") + ` ${head + 1}`;
      const maps = [[`Q · ${name}`, part.q_HTK[head]], [`K · ${name}`, part.k_GSK[group(head)]], [`V · ${name}`, part.v_GSK[group(head)]]];
      return vectors(maps, i => (i ? keys(state.stack) : queries(state.stack)), room);
    },
  },
  scores: {
    title: ["Scores QKᵀ/√d_k, before the mask", "分数 QKᵀ/√d_k（掩码前）"], by: "jaxformer.attention.reference.scores_BHTS",
    caption: () => ["Dot products: how well each query (row) fits each key (column).", "点积：每个查询（行）与每个键（列）有多合。"],
    ...attentionMap(run => picked(sublayer(run).scores_HTS), { signed: true }),
  },
  masked_scores: {
    title: ["Scores after the mask", "分数（掩码后）"], by: "jaxformer.attention.mask.Mask.allowed_BTS",
    caption: () => ["Grey is −∞: PAD, and in the decoder the future, may not be looked at.", "灰色为 −∞：不许看 PAD；在解码器中也不许看未来。"],
    ...attentionMap(run => masked(sublayer(run)), { signed: true }),
  },
  weights: {
    title: ["Weights after softmax", "softmax 之后的权重"], by: "jaxformer.attention.reference.softmax",
    caption: () => ["Each row sums to one: the shares in which values are mixed.", "每行之和为一：按这些份额混合各个值。"],
    ...attentionMap(run => picked(sublayer(run).weights_HTS), { top: 1 }),
  },
  heads: {
    title: ["All layers and heads", "所有层与头"], by: "jaxformer.model.recorded",
    caption: () => ["One small map for each head; click to choose it. Heads of one layer look for different things.", "每个头一幅小图，点击即选。同一层的头各有所寻。"],
    draw(run, room) {
      const svg = canvas(), depth = layersOf(state.stack), H = walk.model.heads, columns = keys(state.stack).length, rows = queries(state.stack).length;
      const side = Math.max(46, Math.min(120, (room - 40) / H - 10)), cell = side / columns, tall = Math.min(cell * 1.4, side / rows), step = rows * tall + 26;
      for (const layer of range(depth)) {
        write(svg, 0, layer * step + 18 + rows * tall / 2, say("L", "层") + (layer + 1), { fill: SOFT });
        for (const head of range(H)) {
          const x = 32 + head * (side + 10), chosen = state.layer === layer && (state.head === head || state.head < 0);
          write(svg, x, layer * step + 12, `${layer + 1}.${head + 1}`, { fill: chosen ? ORANGE : SOFT, "font-size": 11 });
          heat(svg, sublayer(run, state.stack, layer).weights_HTS[head], { x, y: layer * step + 18, cell, tall, top: 1, pick: () => change({ layer, head }) });
          if (chosen) node("rect", { x: x - 2, y: layer * step + 16, width: side + 4, height: rows * tall + 4, fill: "none", stroke: ORANGE, "stroke-width": 1.5, rx: 4 }, svg);
        }
      }
      return sized(svg, 34 + H * (side + 10), depth * step);
    },
  },
  norms: {
    section: ["Through the layers", "层层向上", "Every sub-layer adds to the residual stream; the length of the vectors tells how much.", "每个子层都向残差流中添加内容；向量的长度说明添了多少。"],
    title: ["Residual stream and what is added", "残差流与每次添加"], by: "jaxformer.model.layers.Block.residual",
    caption: () => ["Left: length of each token's vector after every sub-layer. Right: length of what attention and FFN added.", "左：每个子层之后各词元向量的长度。右：注意力与前馈网络所添加部分的长度。"],
    draw(run, room) {
      const svg = canvas(), side = run[SIDES()], rows = sideTokens(), short = { self_attention: "self", cross_attention: "cross", feed_forward: "FFN" };
      const parts = side.layers.flatMap((layer, i) => Object.keys(short).filter(name => layer[name]).map(name => [`${i + 1} ${short[name]}`, layer[name]]));
      const across = rows.map((_, t) => [side.input_norm_T[t], ...parts.map(([, part]) => part.stream_norm_T[t])]);
      const added = rows.map((_, t) => parts.map(([, part]) => part.added_norm_T[t]));
      const left = Math.max(...rows.map(text => width(text))) + 10, both = room > 660, cell = Math.max(22, Math.min(46, (room - left * (both ? 2 : 1) - 80) / (parts.length + 1) / (both ? 2 : 1)));
      const mark = SIDES() === "decoder" ? state.step : undefined, tall = rows.length > 24 ? 14 : 24;
      const one = heat(svg, across, { rows, columns: [say("input", "输入"), ...parts.map(([name]) => name)], cell, tall, left, title: say("stream", "残差流"), mark });
      const two = heat(svg, added, { rows, columns: parts.map(([name]) => name), cell, tall, left, title: say("added", "添加"), mark, x: both ? one.width + 14 : 0, y: both ? 0 : one.height + 12 });
      return sized(svg, both ? one.width + two.width + 14 : Math.max(one.width, two.width), both ? Math.max(one.height, two.height) : one.height + two.height + 12);
    },
  },
  lens: {
    title: ["Logit lens: what each layer would say", "Logit lens：每一层会说什么"], by: "jaxformer.model.lens",
    caption: () => ["The output layer reads the stream after every decoder layer: watch the answer appear from the bottom (layer 1) upwards.", "让输出层提前读取每个解码层之后的残差流：看答案怎样自下而上出现。"],
    draw(run, room) {
      const svg = canvas(), depth = run.lens.length, widest = Math.max(...run.lens.flat().map(at => width(at.candidates[0].piece))) + 14;
      const cell = Math.max(widest, 50, Math.min(92, (room - 46) / steps));
      range(depth).forEach(row => {
        const layer = depth - 1 - row, y = 20 + row * 40;
        write(svg, 0, y + 22, say("layer ", "第") + (layer + 1) + say("", "层"), { fill: SOFT });
        run.lens[layer].forEach((at, t) => {
          const best = at.candidates[0], rgb = colour(best.probability, 1), light = best.probability > 0.5 ? "#fff" : INK;
          node("rect", { x: 54 + t * cell, y, width: cell - 3, height: 36, rx: 5, fill: `rgb(${rgb})`, stroke: t === state.step ? ORANGE : best.id === at.chosen.id ? BLUE : "#dfe4ec", "stroke-width": t === state.step ? 2 : 1 }, svg);
          write(svg, 54 + t * cell + (cell - 3) / 2, y + 16, best.piece, { "text-anchor": "middle", fill: light });
          write(svg, 54 + t * cell + (cell - 3) / 2, y + 30, best.probability.toFixed(2), { "text-anchor": "middle", fill: light, "font-size": 10 });
        });
      });
      walk.target.outputs.forEach((text, t) => write(svg, 54 + t * cell + (cell - 3) / 2, 12, text, { "text-anchor": "middle", fill: t === state.step ? ORANGE : SOFT, "font-size": 11 }));
      return sized(svg, 56 + steps * cell, 24 + depth * 40);
    },
  },
  candidates: {
    section: ["One word at a time", "一次一词", "Move the slider: at each step the decoder reads what is written and gives every token a probability.", "拖动滑块：每一步，解码器读取已写出的内容，给每个词元一个概率。"],
    title: ["The next token", "下一个词元"], by: "jaxformer.inference.decode.log_probabilities",
    caption: () => ["The likeliest tokens at this step and their probabilities; blue is the one that was written.", "此步最可能的词元及其概率；蓝色为实际写出者。"],
    draw(run, room) {
      const svg = canvas(), at = run.steps[state.step], list = [...at.candidates];
      if (!list.some(one => one.id === at.chosen.id)) list.push(at.chosen);
      write(svg, 0, 14, [...walk.target.inputs.slice(Math.max(0, state.step - 7), state.step + 1)].join(" ") + " …", { fill: SOFT });
      const left = Math.max(64, ...list.map(one => width(one.piece, 14))) + 10, bar = Math.max(90, Math.min(380, room - left - 70));
      list.forEach((one, i) => {
        const y = 28 + i * 26, chosen = one.id === at.chosen.id;
        write(svg, left - 8, y + 15, one.piece, { "text-anchor": "end", "font-size": 14, "font-weight": chosen ? 700 : 400 });
        node("rect", { x: left, y, width: bar, height: 20, rx: 4, fill: "#eef1f6" }, svg);
        node("rect", { x: left, y, width: Math.max(2, bar * one.probability), height: 20, rx: 4, fill: chosen ? BLUE : "#9db4d3" }, svg);
        write(svg, left + bar + 8, y + 15, shown(one.probability), { fill: chosen ? INK : SOFT });
      });
      return sized(svg, left + bar + 66, 32 + list.length * 26);
    },
  },
  beam: {
    title: ["Beam search: kept and dropped", "束搜索：留下与舍弃"], by: "jaxformer.inference.decode.beam_search",
    caption: () => ["Blue hypotheses grow on, green ones reached <eos>, grey ones are dropped; the number is the log-probability so far.", "蓝色继续生长，绿色已到 <eos>，灰色被舍弃；数字是到此为止的对数概率。"],
    draw(run) {
      const svg = canvas(), list = run.beam[Math.min(state.step, run.beam.length - 1)], fates = { grows: [BLUE, say("kept", "留下")], ends: [GREEN, say("ends", "结束")], drops: ["#a3abb9", say("dropped", "舍弃")] };
      let wide = 0;
      list.forEach((one, i) => {
        const y = i * 25 + 4, [ink, word] = fates[one.fate], text = one.pieces.slice(-9).join(" ");
        node("rect", { x: 0, y, width: 58, height: 19, rx: 9, fill: ink }, svg);
        write(svg, 29, y + 14, word, { "text-anchor": "middle", fill: "#fff", "font-size": 11 });
        write(svg, 112, y + 14, one.log_probability.toFixed(3), { "text-anchor": "end", fill: SOFT });
        write(svg, 122, y + 14, (one.pieces.length > 9 ? "… " : "") + text, { "font-size": 13, fill: one.fate === "drops" ? SOFT : INK });
        wide = Math.max(wide, 130 + width(text, 13));
      });
      return sized(svg, wide + 20, list.length * 25 + 4);
    },
  },
};
const crossLayer = () => Math.min(state.layer, layersOf("cross") - 1);
if (runs.length > 1) FIGURES.difference = {
  section: ["What the ablation changed", "消融改变了什么", "Both models read the same translation; only the part that was taken away differs.", "两个模型读同一译文，只差被拿掉的部分。"],
  title: ["Probability of each token that was written", "所写各词元的概率"], by: "jaxformer.explain.walk.run", once: true,
  caption: () => ["Blue is the whole model, orange the one without: where the orange bar is shorter, the missing part mattered.", "蓝色为完整模型，橙色为消融后的模型：橙条变短之处，正是被拿掉的部分起作用之处。"],
  draw(_, room) {
    const svg = canvas(), left = Math.max(...walk.target.outputs.map(text => width(text, 14))) + 14, bar = Math.max(90, Math.min(460, room - left - 70));
    walk.target.outputs.forEach((text, t) => {
      const y = t * 34;
      write(svg, left - 8, y + 19, text, { "text-anchor": "end", "font-size": 14, ...(t === state.step ? { "font-weight": 700 } : {}) });
      runs.forEach((run, i) => {
        const p = run.steps[t].chosen.probability;
        node("rect", { x: left, y: y + 2 + i * 14, width: Math.max(2, bar * p), height: 12, rx: 3, fill: i ? "#dd7a3f" : BLUE }, svg);
        write(svg, left + Math.max(2, bar * p) + 6, y + 12 + i * 14, shown(p), { fill: SOFT, "font-size": 11 });
      });
    });
    return sized(svg, left + bar + 66, steps * 34);
  },
};
