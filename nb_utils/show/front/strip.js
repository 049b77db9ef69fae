// Where a detector and an executor fire, token by token: colour says how much, the number below says it too.

const ROLES = { detector: ["0, 114, 178", "Detector"], executor: ["213, 94, 0", "Executor"] };

function stripOf(tokens, kinds, activations, role) {
  const most = Math.max(1e-9, ...activations.map((a) => a ?? 0));
  return el("div", { class: "nbw-strip", role: "list", "aria-label": `${ROLES[role][1]} by token` }, ...tokens.map((token, i) => {
    const a = activations[i];
    return el("span", { role: "listitem", "data-kind": kinds[i] ?? "", style: a > 0 ? `background:rgba(${ROLES[role][0]},${(0.12 + 0.43 * a / most).toFixed(2)})` : "" },
      el("code", {}, visible(token)), el("small", {}, a == null ? "–" : a > 0 ? String(Math.round(a)) : "·"));
  }));
}

function render({ model, el: root }) {
  hideWords(model);
  const data = JSON.parse(model.get("data"));
  const names = Object.keys(data.tasks);
  let live = null;
  const status = el("p", { class: "nbw-status", role: "status" }, `Precomputed with ${data.model}. Run this page in JupyterLab (make lab) to type a prompt and choose latents.`);
  const problem = el("p", { class: "nbw-error", role: "alert", hidden: true });
  const task = el("select", { "data-field": "task" });
  const layer = el("select", { "data-field": "layer" });
  const prompt = el("textarea", { rows: 4, "data-field": "prompt", spellcheck: "false" });
  const latents = { detector: el("input", { type: "number", min: 0, "data-field": "detector" }), executor: el("input", { type: "number", min: 0, "data-field": "executor" }) };
  const own = el("div", { class: "nbw-controls", hidden: true }, field("Prompt: examples x -> y, then x ->", prompt), el("div", {}, field("Detector's latent", latents.detector), field("Executor's latent", latents.executor)));
  const strips = el("div", { "data-field": "strips" });
  root.append(el("div", { class: "nbw", role: "group", "aria-label": "Token strip", "data-mode": "precomputed" }, status,
    el("div", { class: "nbw-controls" }, field("Task", task), field("Layer", layer)), own, problem, strips));

  const stored = () => data.tasks[task.value]?.layers[layer.value];
  function draw(tokens, kinds, by, says) {
    strips.replaceChildren(...Object.keys(ROLES).filter((role) => by[role]).map((role) =>
      el("section", {}, el("h4", {}, `${ROLES[role][1]}: ${says(role)}`), stripOf(tokens, kinds, by[role], role))));
  }
  function fromTable() {
    problem.hidden = true;
    const found = stored();
    if (!found) return strips.replaceChildren("Nothing is stored for this layer: type latents.");
    const by = Object.fromEntries(Object.entries(found.roles).map(([role, r]) => [role, r.activations]));
    draw(found.tokens, found.kinds, by, (role) => `latent ${found.roles[role].latent}, ${Math.round(100 * found.roles[role].share)} % of its activation on ${role === "detector" ? "outputs" : "arrows"}`);
    prompt.value = found.tokens.slice(found.tokens[0] === "<bos>" ? 1 : 0).join("");
    for (const role of Object.keys(ROLES)) latents[role].value = found.roles[role]?.latent ?? "";
  }
  function listLayers() {
    const all = live ? live.layers : Object.keys(data.tasks[task.value]?.layers ?? {}).map(Number);
    const before = Number(layer.value);
    fill(layer, all.slice().sort((a, b) => a - b).map((l) => [l, `after block ${l}`]), all.includes(before) ? before : all.includes(8) ? 8 : all[0]);
    fromTable();
  }
  let asked = 0, busy = false;
  async function compute() {
    asked += 1;
    if (busy) return;
    busy = true;
    for (let done = 0; done !== asked;) {
      done = asked;
      const wanted = Object.values(latents).map((input) => (input.value === "" ? null : Number(input.value)));
      const reply = await ask({ what: "strip", prompt: prompt.value, layer: Number(layer.value), latents: wanted });
      if (done !== asked) continue;
      problem.hidden = !reply.error;
      problem.replaceChildren(reply.error ?? "");
      if (reply.error) strips.replaceChildren();
      else draw(reply.tokens, reply.kinds, { detector: reply.activations[0], executor: reply.activations[1] }, (role) => `latent ${latents[role].value}, computed live`);
    }
    busy = false;
  }
  const ask = line(model, (told) => {
    if (told.kind === "loading") status.replaceChildren("Precomputed; the kernel is loading the model …");
    if (told.kind === "refused") status.replaceChildren(`Precomputed: the kernel cannot compute (${told.error})`);
    if (told.kind === "live") {
      live = told;
      root.firstChild.dataset.mode = "live";
      own.hidden = false;
      status.replaceChildren(`Live: type a prompt or latents, and the kernel computes (${told.model}).`);
      listLayers();
    }
  });
  fill(task, names.map((name) => [name, data.tasks[name].title]), names[0]);
  task.addEventListener("change", listLayers);
  layer.addEventListener("change", () => (stored() ? fromTable() : compute()));
  for (const input of [prompt, ...Object.values(latents)]) input.addEventListener("input", compute);
  if (names.length) listLayers();
  else strips.replaceChildren("Nothing is precomputed for this model: run python -m workflow.explore_grid.");
  model.send({ what: "hello" });
}

export default { render };
