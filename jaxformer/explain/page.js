"use strict";
// Draws the walk that stands in this page. Figures are SVG; heat maps are images inside them, one
// pixel block a cell, so that 64 tokens are one element and not four thousand.
const walk = JSON.parse(document.getElementById("walk").textContent);
const runs = walk.runs, steps = walk.target.outputs.length;
const state = { language: navigator.language.startsWith("zh") ? "zh" : "en", stack: "cross", layer: 0, head: -1, step: 0 };
const say = (en, zh) => (state.language === "zh" ? zh : en);
const NS = "http://www.w3.org/2000/svg", FONT = 'system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif';
const INK = "#1d2433", SOFT = "#5d6678", BLUE = "#1f5fbf", ORANGE = "#c8561b", GREEN = "#2d7d46";
const STACKS = {
  encoder: { side: "encoder", name: "self_attention", en: "encoder", zh: "编码器" },
  decoder: { side: "decoder", name: "self_attention", en: "decoder", zh: "解码器" },
  cross: { side: "decoder", name: "cross_attention", en: "cross", zh: "交叉" },
};

// Numbers ------------------------------------------------------------------------------------
const range = n => [...Array(n).keys()];
const source = () => walk.source.pieces, inputs = () => walk.target.inputs;
const layersOf = stack => runs[0][STACKS[stack].side].layers.length;
const sublayer = (run, stack = state.stack, layer = state.layer) => run[STACKS[stack].side].layers[layer][STACKS[stack].name];
const mean = maps => maps[0].map((row, t) => row.map((_, s) => maps.reduce((sum, map) => sum + map[t][s], 0) / maps.length));
const picked = maps => (state.head < 0 ? mean(maps) : maps[state.head]);
const group = head => Math.floor(Math.max(head, 0) / (walk.model.heads / walk.model.kv_heads));
const minus = (a, b) => a.map((row, t) => row.map((x, s) => (x === null || b[t][s] === null ? null : x - b[t][s])));
const shown = x => (x === null ? "−∞" : Math.abs(x) >= 0.001 || x === 0 ? String(+x.toPrecision(3)) : x.toExponential(1));
const largest = map => Math.max(1e-9, ...map.map(row => row.reduce((m, x) => Math.max(m, Math.abs(x ?? 0)), 0)));
const queries = stack => (stack === "encoder" ? source() : inputs());
const keys = stack => (stack === "decoder" ? inputs() : source());
const masked = part => picked(part.scores_HTS).map((row, t) => row.map((x, s) => (part.allowed_TS[t][s] ? x : null)));

// SVG ----------------------------------------------------------------------------------------
function node(name, attributes, parent, text) {
  const made = document.createElementNS(NS, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}
function canvas() { return node("svg", { xmlns: NS, "font-family": FONT, "font-size": 12 }); }
function sized(svg, width, height) {
  for (const [key, value] of [["width", width], ["height", height], ["viewBox", `0 0 ${width} ${height}`]]) svg.setAttribute(key, value);
  return svg;
}
const write = (svg, x, y, text, more = {}) => node("text", { x, y, fill: INK, ...more }, svg, text);
const ruler = document.createElement("canvas").getContext("2d");
function width(text, size = 12) { ruler.font = `${size}px ${FONT}`; return ruler.measureText(text).width; }
const mix = (from, to, share) => from.map((c, i) => Math.round(c + (to[i] - c) * share));
const WHITE = [255, 255, 255];
function colour(x, top, signed) {
  if (x === null) return [233, 235, 240];
  const share = Math.min(1, Math.abs(x) / top);
  if (signed) return mix(WHITE, x < 0 ? [196, 84, 27] : [31, 95, 191], share ** 0.8);
  return share < 0.5 ? mix([247, 250, 255], [116, 169, 219], share * 2) : mix([116, 169, 219], [13, 59, 134], share * 2 - 1);
}

/** A heat map with its labels, in a group at (0, y); returns its size. */
function heat(svg, map, o) {
  const rows = o.rows ?? [], columns = o.columns ?? [];
  const left = o.left ?? (rows.length ? Math.max(...rows.map(text => width(text))) + 10 : 0);
  const tilted = columns.some(text => width(text) > o.cell - 2);
  const above = (o.title ? 18 : 0) + (columns.length ? (tilted ? Math.max(...columns.map(text => width(text))) * 0.72 + 12 : 18) : 0);
  const w = map[0].length * o.cell, tall = o.tall ?? o.cell, h = map.length * tall;
  const top = o.top ?? largest(map), block = 6, picture = document.createElement("canvas");
  picture.width = map[0].length * block; picture.height = map.length * block;
  const brush = picture.getContext("2d");
  map.forEach((row, t) => row.forEach((x, s) => { brush.fillStyle = `rgb(${colour(x, top, o.signed)})`; brush.fillRect(s * block, t * block, block, block); }));
  const at = node("g", { transform: `translate(${o.x ?? 0} ${o.y ?? 0})` }, svg);
  if (o.title) write(at, left, 12, o.title, { fill: SOFT, "font-size": 12 });
  const image = node("image", { x: left, y: above, width: w, height: h, preserveAspectRatio: "none", style: "image-rendering:pixelated", href: picture.toDataURL() }, at);
  node("rect", { x: left, y: above, width: w, height: h, fill: "none", stroke: "#d5dbe5" }, at);
  rows.forEach((text, t) => write(at, left - 6, above + (t + 0.5) * tall + 4, text, { "text-anchor": "end", ...(o.mark === t ? { "font-weight": 700, fill: BLUE } : {}), ...(tall < 11 ? { "font-size": tall } : {}) }));
  columns.forEach((text, s) => {
    const x = left + (s + 0.5) * o.cell, y = above - 6;
    write(at, x, y, text, tilted ? { transform: `rotate(-45 ${x} ${y})`, ...(o.cell < 12 ? { "font-size": o.cell } : {}) } : { "text-anchor": "middle" });
  });
  if (o.mark !== undefined && o.mark < map.length) node("rect", { x: left - 1, y: above + o.mark * tall - 1, width: w + 2, height: tall + 2, fill: "none", stroke: ORANGE, "stroke-width": 2, rx: 3 }, at);
  if (o.cell >= 36 && tall >= 18) map.forEach((row, t) => row.forEach((x, s) => {
    if (x !== null && Math.abs(x) < 0.005 * top) return;
    const dark = x !== null && Math.abs(x) / top > 0.55;
    write(at, left + (s + 0.5) * o.cell, above + (t + 0.5) * tall + 4, x === null ? "−∞" : x.toFixed(Math.abs(x) >= 10 ? 0 : Math.abs(x) >= 2.5 ? 1 : 2), { "text-anchor": "middle", "font-size": 11, fill: x === null ? "#9aa2b1" : dark ? "#fff" : INK });
  }));
  image.addEventListener("mousemove", event => {
    const box = image.getBoundingClientRect();
    const s = Math.min(map[0].length - 1, Math.floor((event.clientX - box.left) / box.width * map[0].length));
    const t = Math.min(map.length - 1, Math.floor((event.clientY - box.top) / box.height * map.length));
    tip(event, `${o.tipRows?.[t] ?? rows[t] ?? t + 1} · ${columns[s] ?? s + 1}: ${shown(map[t][s])}`);
  });
  image.addEventListener("mouseleave", () => tip());
  if (o.pick) { image.style.cursor = "pointer"; image.addEventListener("click", o.pick); }
  return { width: left + w + (tilted ? 26 : 2), height: above + h + 4 };
}
function tip(event, text) {
  const box = document.getElementById("tip");
  box.hidden = !event;
  if (!event) return;
  box.textContent = text;
  box.style.left = Math.min(event.clientX + 12, innerWidth - box.offsetWidth - 6) + "px";
  box.style.top = event.clientY + 14 + "px";
}
const fit = (room, rows, count, least = 9, most = 44) => Math.max(least, Math.min(most, Math.floor((room - Math.max(...rows.map(text => width(text))) - 40) / count)));

// Figures ------------------------------------------------------------------------------------
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
const ORDER = ["difference", "candidates", "beam", "cross_attention", "lines", "heads", "qkv", "scores", "masked_scores", "weights", "embeddings", "norms", "lens"].filter(name => FIGURES[name]);
const BESIDE = [["candidates", "beam"], ["cross_attention", "lines"], ["scores", "masked_scores", "weights"]];

// Page ---------------------------------------------------------------------------------------
function layOut() {
  const main = document.getElementById("figures"), done = new Set();
  for (const name of ORDER) {
    if (done.has(name)) continue;
    const row = runs.length > 1 ? [name] : BESIDE.find(names => names.includes(name)) ?? [name];
    for (const one of row) if (FIGURES[one].section) { const head = document.createElement("h2"), text = document.createElement("p"); head.dataset.of = text.dataset.of = one; main.append(head, text); }
    let place = main;
    if (row.length > 1) { place = document.createElement("div"); place.className = "grid"; main.append(place); }
    for (const one of row) {
      done.add(one);
      const figure = document.createElement("figure");
      figure.id = one;
      figure.innerHTML = '<div class="head"><h3></h3><button data-as="svg">SVG</button><button data-as="png">PNG</button></div><div class="panels"></div><figcaption><span></span><br><code></code></figcaption>';
      figure.querySelectorAll("button").forEach(button => button.addEventListener("click", () => save(one, button.dataset.as)));
      place.append(figure);
    }
  }
}
function draw() {
  document.documentElement.lang = state.language === "zh" ? "zh-Hans" : "en";
  document.getElementById("language").textContent = say("中文", "English");
  document.querySelectorAll("[data-en]").forEach(e => { e.textContent = e.dataset[state.language]; });
  document.querySelectorAll("[data-of]").forEach(e => { const s = FIGURES[e.dataset.of].section; e.textContent = e.tagName === "H2" ? say(s[0], s[1]) : say(s[2], s[3]); });
  document.getElementById("now").textContent = `${state.step + 1}/${steps}  ${walk.target.outputs[state.step]}`;
  document.getElementById("step").value = state.step;
  buttons("stack", Object.keys(STACKS).map(name => [name, say(STACKS[name].en, STACKS[name].zh)]));
  buttons("layer", range(layersOf(state.stack)).map(i => [i, i + 1]));
  buttons("head", [[-1, say("mean", "平均")], ...range(walk.model.heads).map(i => [i, i + 1])]);
  for (const name of ORDER) drawOne(name);
}
function drawOne(name) {
  const figure = document.getElementById(name), spec = FIGURES[name], panels = figure.querySelector(".panels");
  const room = figure.clientWidth - 38;
  figure.querySelector("h3").textContent = say(...spec.title);
  figure.querySelector("figcaption span").textContent = say(...spec.caption());
  figure.querySelector("figcaption code").textContent = spec.by;
  const list = spec.once ? [[null, spec.draw(runs[0], room)]] : runs.map((run, i) => [i ? say("ablated", "消融") : say("original", "原样"), spec.draw(run, half(room))]);
  if (runs.length > 1 && spec.differ) list.push([say("difference (ablated − original)", "差（消融 − 原样）"), spec.differ(runs[0], runs[1], half(room))]);
  panels.replaceChildren(...list.map(([title, svg]) => {
    const panel = document.createElement("div"), scroll = document.createElement("div");
    panel.className = "panel"; scroll.className = "scroll"; scroll.append(svg);
    if (title && runs.length > 1) { const head = document.createElement("b"); head.textContent = title; panel.append(head); }
    panel.append(scroll);
    return panel;
  }));
}
const half = room => (runs.length > 1 && room > 640 ? room / 2 - 14 : room);
function buttons(id, choices) {
  const place = document.getElementById(id);
  place.replaceChildren(...choices.map(([value, text]) => {
    const button = document.createElement("button");
    button.textContent = text; button.dataset.value = value;
    button.setAttribute("aria-pressed", String(state[id] === value));
    button.addEventListener("click", () => change({ [id]: value }));
    return button;
  }));
}
function change(what) {
  Object.assign(state, what);
  state.layer = Math.min(state.layer, layersOf(state.stack) - 1);
  draw();
}
const URLS = svg => "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(svg));
/** The panels of a figure side by side, as one SVG on white. */
function whole(name) {
  const svg = canvas();
  let x = 12, tall = 0;
  node("rect", { width: "100%", height: "100%", fill: "#fff" }, svg);
  document.getElementById(name).querySelectorAll("svg").forEach(panel => {
    const copy = panel.cloneNode(true);
    copy.setAttribute("x", x); copy.setAttribute("y", 12); svg.append(copy);
    x += +panel.getAttribute("width") + 20; tall = Math.max(tall, +panel.getAttribute("height"));
  });
  return sized(svg, x, tall + 24);
}
async function save(name, as) {
  const svg = whole(name);
  if (as === "svg") return download(URLS(svg), `${name}.svg`);
  const image = new Image();
  image.src = URLS(svg);
  await image.decode();
  const picture = document.createElement("canvas");
  picture.width = image.width * 2; picture.height = image.height * 2;
  picture.getContext("2d").drawImage(image, 0, 0, picture.width, picture.height);
  download(picture.toDataURL("image/png"), `${name}.png`);
}
function download(href, name) {
  const link = document.createElement("a");
  link.href = href; link.download = name; link.click();
}
let timer = null;
function play() {
  const button = document.getElementById("play");
  if (timer) { clearInterval(timer); timer = null; button.textContent = "▶"; return; }
  button.textContent = "❚❚";
  timer = setInterval(() => change({ step: (state.step + 1) % steps }), 1100);
}
state.layer = layersOf("cross") - 1;
document.getElementById("step").max = steps - 1;
document.getElementById("step").addEventListener("input", event => change({ step: +event.target.value }));
document.getElementById("play").addEventListener("click", play);
document.getElementById("language").addEventListener("click", () => change({ language: say("zh", "en") }));
layOut();
draw();
let broad = innerWidth;
addEventListener("resize", () => { if (innerWidth !== broad) { broad = innerWidth; draw(); } });
