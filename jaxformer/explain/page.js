"use strict";
// The page around the figures: their order, pickers, language, the player, export.
const ORDER = ["difference", "candidates", "beam", "cross_attention", "lines", "heads", "qkv", "scores", "masked_scores", "weights", "embeddings", "norms", "lens"].filter(name => FIGURES[name]);
const BESIDE = [["candidates", "beam"], ["cross_attention", "lines"], ["scores", "masked_scores", "weights"]];
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
