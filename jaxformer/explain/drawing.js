"use strict";
// What all figures are drawn with: the walk that stands in the page, and SVG. Heat maps are images
// inside it, one pixel block a cell, so that 64 tokens are one element and not four thousand.
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
