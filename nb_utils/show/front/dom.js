// What all our widgets share. Text reaches the page through text nodes only, never as markup.

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Words stand where the control could not be drawn; once it is, they go.
function hideWords(model) {
  for (const words of document.querySelectorAll("[data-words]")) words.hidden ||= words.dataset.words === model.get("mark");
}

// A control with its visible label.
function field(label, control, hint = "") {
  const box = el("label", { class: "nbw-field" }, el("span", {}, label), control);
  if (hint) box.append(el("small", {}, hint));
  return box;
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen) }, text)));
}

const number = (value, digits = 2) => Number(value).toFixed(digits).replace("-", "−");
const visible = (token) => (token === "" ? "∅" : token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣"));

// Questions to the kernel, each with its own answer; what comes unasked goes to `told`.
function line(model, told = () => {}) {
  const waiting = new Map();
  model.on("msg:custom", (content) => {
    const resolve = waiting.get(content.id);
    waiting.delete(content.id);
    (resolve ?? told)(content);
  });
  return (question) =>
    new Promise((resolve) => {
      const id = crypto.randomUUID?.() ?? String(Math.random());
      waiting.set(id, resolve);
      model.send({ ...question, id });
    });
}

// Lines over numbers: series are {name, color, points: [[x, y]], dash}; `mark` draws a vertical at its x.
function chart(series, { label, x, y, mark = null, ticks = null, title }) {
  const [w, h, left, bottom, top, right] = [420, 210, 44, 38, 8, 12];
  const xs = series.flatMap((s) => s.points.map((p) => p[0]));
  const ys = series.flatMap((s) => s.points.map((p) => p[1]));
  const [x0, x1, y1] = [Math.min(...xs), Math.max(...xs), Math.max(...ys) * 1.05 || 1];
  const px = (v) => left + ((v - x0) / (x1 - x0 || 1)) * (w - left - right);
  const py = (v) => h - bottom - (v / y1) * (h - bottom - top);
  const picture = svg("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": title, class: "nbw-chart" });
  const text = (value, attributes) => svg("text", { "font-size": 11, fill: "currentColor", ...attributes }, value);
  const step = [0.5, 1, 2, 5, 10, 20, 50].find((s) => y1 / s <= 6) ?? 100;
  for (let v = 0; v <= y1; v += step) {
    picture.append(svg("line", { x1: left, x2: w - right, y1: py(v), y2: py(v), stroke: "currentColor", opacity: 0.15 }));
    picture.append(text(String(v), { x: left - 6, y: py(v) + 4, "text-anchor": "end" }));
  }
  for (const v of ticks ?? [x0, (x0 + x1) / 2, x1]) {
    picture.append(text(number(v, Number.isInteger(v) ? 0 : 2), { x: px(v), y: h - bottom + 15, "text-anchor": "middle" }));
  }
  picture.append(text(x, { x: (left + w - right) / 2, y: h - 5, "text-anchor": "middle" }));
  picture.append(text(y, { x: 12, y: (h - bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(h - bottom) / 2})` }));
  for (const s of series) {
    const points = s.points.map(([a, b]) => `${px(a)},${py(b)}`).join(" ");
    picture.append(svg("polyline", { points, fill: "none", stroke: s.color, "stroke-width": 2, "stroke-dasharray": s.dash ?? "" }));
    if (!s.dash) for (const [a, b] of s.points) picture.append(svg("circle", { cx: px(a), cy: py(b), r: 2.5, fill: s.color }));
  }
  if (mark !== null && mark >= x0 && mark <= x1) {
    picture.append(svg("line", { x1: px(mark), x2: px(mark), y1: top, y2: h - bottom, stroke: "#D55E00", "stroke-width": 1.5 }));
  }
  const named = series.map((s) => el("span", {}, el("i", { style: `background:${s.color}` }), s.name));
  return el("figure", { class: "nbw-figure" }, el("figcaption", {}, label), picture, el("p", { class: "nbw-legend" }, ...named));
}
