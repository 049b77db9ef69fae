// One slider: the features of a task together, added to prompts without examples. All numbers are stored in `data`.

function render({ model, el: root }) {
  hideWords(model);
  const data = JSON.parse(model.get("data"));
  const names = Object.keys(data.tasks);
  if (!names.length) return root.append(el("p", {}, "Nothing is precomputed for this model: run python -m workflow.explore_grid."));
  const task = el("select", { "data-field": "task" });
  const scale = el("input", { type: "range", min: 0, step: 1, "data-field": "scale" });
  const said = el("output", { "data-field": "scale-text" });
  const lines = el("ul", { class: "nbw-lines", "aria-live": "polite" });
  const mean = el("p", { "data-field": "mean" });
  const entry = () => data.tasks[task.value];

  function draw() {
    const own = entry(), at = Number(scale.value);
    const strength = own.scales[at];
    said.replaceChildren(strength === 0 ? "no vector" : `${number(strength)} × the stream's length`);
    scale.setAttribute("aria-valuetext", said.textContent);
    lines.replaceChildren(...own.examples.map(([x, y], i) => {
      const [token, share, right] = own.views[at][i];
      return el("li", { "data-right": String(right) }, el("code", {}, `${x} ->`), " ",
        el("b", {}, visible(token.replace(/^ (?=.)/, ""))), ` ${Math.round(100 * share)} % `,
        el("small", {}, right ? "right" : `answer: ${y}`));
    }));
    mean.replaceChildren(`Over ${data.n_test} test words: ${Math.round(100 * own.accuracy[at])} % right, loss ${number(own.loss[at])} nats.`);
  }
  function choose() {
    scale.max = entry().scales.length - 1;
    scale.value = entry().scales.indexOf(entry().start);
    draw();
  }
  fill(task, names.map((name) => [name, data.tasks[name].title]), names[0]);
  task.addEventListener("change", choose);
  scale.addEventListener("input", draw);
  root.append(el("div", { class: "nbw", role: "group", "aria-label": "One vector, one slider", "data-mode": "precomputed" },
    el("div", { class: "nbw-controls" }, field("Task", task), field("How much of its vector", el("span", { class: "nbw-slider" }, scale, said))),
    lines, mean));
  choose();
}

export default { render };
