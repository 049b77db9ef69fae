// Say the values of a figure: where the mouse is, or where the arrow keys have gone.
function readable(figure) {
  const spots = [...figure.querySelectorAll(".nb-spot")], picture = figure.querySelector("svg");
  if (!spots.length) return;
  const said = document.createElement("output");
  said.className = "nb-said";
  picture.after(said);
  const words = new Map(spots.map((spot) => [spot, spot.textContent]));
  spots.forEach((spot) => spot.replaceChildren()); // the browser's own words would stand beside ours
  let at = -1;
  const say = (spot) => {
    figure.querySelector(".nb-at")?.classList.remove("nb-at");
    spot?.classList.add("nb-at");
    said.textContent = words.get(spot) ?? "";
  };
  picture.addEventListener("pointerover", (event) => say(event.target.closest(".nb-spot") ?? spots[at]));
  picture.addEventListener("pointerleave", () => say(spots[at]));
  picture.setAttribute("tabindex", "0");
  picture.setAttribute("role", "group");
  picture.setAttribute("aria-roledescription", "figure whose values the arrow keys read");
  picture.addEventListener("blur", () => say((at = -1)));
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    at = (at + step + spots.length + (at < 0 && step < 0)) % spots.length;
    say(spots[at]);
  });
}

document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("figure.nb-values").forEach(readable));
