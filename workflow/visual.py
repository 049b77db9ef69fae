"""A visual model: it sees a grid of pictures, an example in and out, a query, and paints the query's answer.

Every picture has a figure on a ground, warm colours on cool ones. It may be shown as it is, dark, grey, or with a hole;
what is to be made of it is one of eight operations. Both are drawn apart, so that a query never tells the operation:
only the example does. `workflow.see` trains the model, `book/experiments/23_visual_task_vectors.ipynb` looks into it.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import max_pool2d, relu

from nb_utils import files, saes
from nb_utils.text import visible
from workflow import training

SHIPPED = Path(__file__).resolve().parents[1] / "visual"
SIDE, PATCH = 16, 4  # pixels of a picture and of a patch, a token each
PLACES = (SIDE // PATCH) ** 2  # patches of a picture
SHOWN = 12  # grids a task that a stage of training is measured on
KINDS = ("clean", "dark", "grey", "hole")
OPERATIONS = ("copy", "restore", "segment", "edges", "invert", "mirror", "rotate", "cut_out")
DARK, HOLE = 0.35, 5  # what is left of the light; side of a hole, in pixels
SIZES, SHIFT = (8, 10, 12), 2  # of figures, and how far they may be off the middle, in pixels
GROUPS = ("query", "answer")  # the tokens where heads are patched
HELD = 5  # one figure of so many is never trained on
# All that is trained: to restore a clean picture is to copy it.
TRAINED = [(kind, made) for kind in KINDS for made in OPERATIONS if (kind, made) != ("clean", "restore")]
# What the book looks into: five tasks of the original, and seven more.
TASKS = {
    "identity": ("clean", "copy"), "segmentation": ("clean", "segment"), "low_light": ("dark", "restore"),
    "inpainting": ("hole", "restore"), "colourisation": ("grey", "restore"), "edges": ("clean", "edges"),
    "invert": ("clean", "invert"), "mirror": ("clean", "mirror"), "rotate": ("clean", "rotate"),
    "cut_out": ("clean", "cut_out"), "dark_copy": ("dark", "copy"), "grey_copy": ("grey", "copy"),
}  # fmt: skip


At = Callable[[int, Tensor], Tensor]  # a block and what stands there -> what goes on


class VisualError(ValueError):
    """Pictures or a visual model that cannot be had or are others than asked for; the message says what to do."""


# Figures


@dataclass(frozen=True)
class Figures:
    """Shapes to paint, in three sizes: how much of each pixel they cover, from 0 to 1."""

    name: str
    masks: Float[Tensor, "n sizes side side"]

    def __len__(self) -> int:
        return len(self.masks)

    @cached_property
    def split(self) -> tuple["Figures", "Figures"]:
        """Those to train on and those held out, by what they look like, as the pinned packages draw them."""
        digests = [hashlib.sha256(mask.mul(255).byte().numpy().tobytes()).digest() for mask in self.masks]
        held = torch.tensor([digest[0] % HELD == 0 for digest in digests])
        return Figures(self.name, self.masks[~held]), Figures(self.name, self.masks[held])


@cache
def figures(source: str = "glyphs") -> Figures:
    """Return figures: the ``glyphs`` of a bold font, drawn ``shapes``, or the pictures of a folder.

    Of a picture, what is not transparent is the figure. Raises VisualError if it is no such folder.
    """
    if source == "glyphs":
        return _figures(source, _glyphs())
    if source == "shapes":
        return _figures(source, _shapes())
    if not Path(source).is_dir():
        raise VisualError(f"{visible(source)!r} is no folder of pictures: give one, or take glyphs or shapes.")
    return _figures(source, _pictures(Path(source)))


def _glyphs() -> Iterator[Image.Image]:
    path = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans-Bold.ttf")
    font = ImageFont.truetype(str(path), 48)
    for code in sorted(FT2Font(str(path)).get_charmap()):
        if code < 0x2E80 and chr(code).isprintable():
            picture = Image.new("L", (96, 96))
            ImageDraw.Draw(picture).text((24, 16), chr(code), 255, font)
            yield picture


def _shapes(n: int = 200) -> Iterator[Image.Image]:
    """Draw polygons and stars of three to nine corners, whole and with a hole."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        corners, start, inner = rng.integers(3, 10), rng.uniform(0, 2 * np.pi), rng.choice([0.4, 0.6, 1.0])
        angles = start + np.arange(2 * corners) * np.pi / corners
        reach = np.where(np.arange(2 * corners) % 2, inner * np.cos(np.pi / corners) if inner == 1 else inner, 1.0)
        around = np.stack([np.cos(angles), np.sin(angles) * rng.uniform(0.6, 1)], 1) * reach[:, None] * 44
        picture = Image.new("L", (96, 96))
        brush = ImageDraw.Draw(picture)
        brush.polygon([tuple(point) for point in around + 48], fill=255)
        if rng.random() < 0.4:
            brush.polygon([tuple(point) for point in 0.45 * around + 48], fill=0)
        yield picture


def _pictures(folder: Path) -> Iterator[Image.Image]:
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        try:
            with Image.open(path) as picture:
                yield picture.convert("RGBA").getchannel("A")
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
            continue  # a folder may hold other files


def _figures(source: str, pictures: Iterator[Image.Image]) -> Figures:
    found = {}
    for picture in pictures:
        box = picture.getbbox()
        if box is None or min(box[2] - box[0], box[3] - box[1]) * 4 < max(box[2] - box[0], box[3] - box[1]):
            continue  # nothing, or little more than a line
        sizes = np.stack([_placed(picture.crop(box), size) for size in SIZES])
        if 0.1 < sizes[-1].sum() / SIZES[-1] ** 2 < 0.9:
            found[sizes.tobytes()] = sizes
    if len(found) < 2 * HELD:
        raise VisualError(f"{visible(source)!r} has {len(found)} figures that can be used, and {2 * HELD} are needed: "
                          "give more pictures that have a figure on transparent ground.")  # fmt: skip
    return Figures(source, torch.from_numpy(np.stack(list(found.values()))))


def _placed(picture: Image.Image, size: int) -> np.ndarray:
    """Return a picture, scaled to a size, in the middle of an empty one."""
    scale = size / max(picture.size)
    small = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BOX)
    found = np.zeros((SIDE, SIDE), dtype=np.float32)
    top, left = (SIDE - small.height) // 2, (SIDE - small.width) // 2
    found[top : top + small.height, left : left + small.width] = np.asarray(small, dtype=np.float32) / 255
    return found


# Grids


@dataclass(frozen=True)
class Pictures:
    """Painted pictures, in red, green and blue from 0 to 1, with where their figures are and where a hole would be."""

    clean: Float[Tensor, "n 3 side side"]
    figure: Float[Tensor, "n 1 side side"]
    hole: Float[Tensor, "n 1 side side"]

    def shown(self, kinds: Int[Tensor, " n"]) -> Float[Tensor, "n 3 side side"]:
        """Return the pictures, each as its kind (its number in `KINDS`) shows it."""
        light = self.clean.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        grey = (self.clean * light).sum(1, keepdim=True).expand_as(self.clean)
        ways = torch.stack([self.clean, self.clean * DARK, grey, self.clean * (1 - self.hole)])
        return ways[kinds, torch.arange(len(kinds))]

    def made(self, kinds: Int[Tensor, " n"]) -> Float[Tensor, "operations n 3 side side"]:
        """Return what every operation makes of the pictures as they are shown."""
        shown, whole = self.shown(kinds), self.figure.expand_as(self.clean)
        around = max_pool2d(self.figure, 3, 1, 1).expand_as(whole) - whole
        return torch.stack([
            shown, self.clean, whole, around, 1 - shown, shown.flip(-1), shown.rot90(1, (-2, -1)), shown * whole
        ])  # fmt: skip


@dataclass(frozen=True)
class Grids:
    """Grids of pictures. ``answers``: what each operation would make of the query; ``asked``: the number of the one.

    The example is a picture as it is shown and what the operation makes of it.
    """

    example: Float[Tensor, "n 2 3 side side"]
    query: Float[Tensor, "n 3 side side"]
    answers: Float[Tensor, "operations n 3 side side"]
    asked: Int[Tensor, " n"]

    @property
    def answer(self) -> Float[Tensor, "n 3 side side"]:
        return self.answers[self.asked, torch.arange(len(self.asked))]

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, which) -> "Grids":
        return Grids(self.example[which], self.query[which], self.answers[:, which], self.asked[which])


def _colours(hue: tuple[float, float], n: int, generator: torch.Generator) -> Float[Tensor, "n 3 side side"]:
    """Draw smooth colours: between four corners of a hue, in turns, within bounds."""
    h, s, v = torch.rand(3, n, 4, generator=generator)
    h, s, v = hue[0] + h * (hue[1] - hue[0]), 0.4 + 0.6 * s, 0.4 + 0.6 * v
    sector = (torch.tensor([5.0, 3.0, 1.0]) + h[..., None] * 6) % 6  # of the wheel, for red, green and blue
    corners = v[..., None] * (1 - s[..., None] * torch.minimum(sector, 4 - sector).clamp(0, 1))
    line = torch.linspace(0, 1, SIDE)
    ends = torch.stack([1 - line, line])
    return torch.einsum("nabc,ay,bx->ncyx", corners.view(n, 2, 2, 3), ends, ends)


def paint(of: Figures, n: int, generator: torch.Generator) -> Pictures:
    """Paint random figures, of any size, mirrored or not, somewhere near the middle; warm on cool colours."""
    pick, size = (torch.randint(k, (n,), generator=generator) for k in of.masks.shape[:2])
    figure = of.masks[pick, size]
    figure = torch.where(torch.rand(n, 1, 1, generator=generator) < 0.5, figure.flip(-1), figure)
    shift = torch.randint(-SHIFT, SHIFT + 1, (2, n, 1), generator=generator)
    down, right = (torch.arange(SIDE) - shift) % SIDE
    figure = figure[torch.arange(n)[:, None, None], down[:, :, None], right[:, None, :]][:, None]
    ground, warm = _colours((0.45, 0.72), n, generator), _colours((-0.08, 0.17), n, generator)
    top, left = torch.randint(SIDE - HOLE + 1, (2, n, 1), generator=generator)
    rows, columns = ((first <= torch.arange(SIDE)) & (torch.arange(SIDE) < first + HOLE) for first in (top, left))
    return Pictures(ground * (1 - figure) + warm * figure, figure, (rows[:, :, None] & columns[:, None])[:, None] * 1.0)


def grids(
    of: Figures, kinds: Int[Tensor, " n"], asked: Int[Tensor, " n"], generator: torch.Generator,
    shown: Int[Tensor, " n"] | None = None,
) -> Grids:  # fmt: skip
    """Draw a grid for each kind and operation; ``shown``: the operations of the examples, if others."""
    example, query = paint(of, len(kinds), generator), paint(of, len(kinds), generator)
    out = example.made(kinds)[asked if shown is None else shown, torch.arange(len(kinds))]
    return Grids(torch.stack([example.shown(kinds), out], 1), query.shown(kinds), query.made(kinds), asked)


def joined(parts: Sequence[Grids]) -> Grids:
    """Put grids after one another."""
    answers = torch.cat([part.answers for part in parts], 1)
    example, query, asked = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("example", "query", "asked")
    )
    return Grids(example, query, answers, asked)


def another(
    kinds: Int[Tensor, " n"], asked: Int[Tensor, " n"], generator: torch.Generator
) -> Int[Tensor, " n"]:  # fmt: skip
    """Draw another operation for each, which makes something else of a picture of that kind."""
    other = (asked + torch.randint(1, len(OPERATIONS), asked.shape, generator=generator)) % len(OPERATIONS)
    same = (kinds == KINDS.index("clean")) & (asked < 2) & (other < 2)  # of a clean picture, to copy is to restore
    return torch.where(same, OPERATIONS.index("invert"), other)


def rivals(task: str) -> list[str]:
    """List the tasks whose operations make something else of the task's pictures than its own does."""
    kind, made = TASKS[task]
    same = {"copy", "restore"} if kind == "clean" and made in ("copy", "restore") else {made}
    return [name for name, (_, other) in TASKS.items() if other not in same]


def numbered(tasks: Sequence[tuple[str, str]], n: int = 1) -> tuple[Int[Tensor, " all"], Int[Tensor, " all"]]:
    """Return the numbers of kinds and operations of tasks, each ``n`` times."""
    pairs = torch.tensor([(KINDS.index(kind), OPERATIONS.index(made)) for kind, made in tasks])
    kinds, asked = pairs.repeat_interleave(n, 0).T
    return kinds, asked


# The model


@dataclass(frozen=True)
class Spec:
    """What the model is, and how it is trained. ``alone``: the weight of the loss without example.

    Without one the best answer is a mean of all; a model that has never been without would be hurt by that itself.
    """

    name: str = "grids"
    seed: int = 0
    blocks: int = 6
    d_model: int = 128
    heads: int = 4
    batch: int = 64
    steps: int = 6_000
    rate: float = 2e-3
    alone: float = 0.1
    stages: int = 12  # moments of training that are measured

    def __post_init__(self):
        if self.d_model % self.heads:
            raise VisualError(f"{self.d_model} dimensions are not {self.heads} heads of one size.")


class Block(torch.nn.Module):
    """A block of a transformer: attention, which sees everything, then a perceptron, each after a norm."""

    def __init__(self, d_model: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before, self.between = torch.nn.LayerNorm(d_model), torch.nn.LayerNorm(d_model)
        self.read, self.write = torch.nn.Linear(d_model, 3 * d_model), torch.nn.Linear(d_model, d_model)
        self.widen, self.narrow = torch.nn.Linear(d_model, 4 * d_model), torch.nn.Linear(4 * d_model, d_model)

    def forward(self, x: Float[Tensor, "n tokens d_model"], first: int, heads: Callable | None) -> Tensor:
        """Return the stream after the block, of tokens from ``first`` on; ``heads`` may change what heads give."""
        q, k, v = self.read(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, x = q[:, :, first:], x[:, first:]
        # In place of torch's fused attention, whose way back takes five times as long on a CPU for so few tokens.
        z = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
        z = z.transpose(1, 2)  # [n, tokens, heads, d_head]
        x = x + self.write((z if heads is None else heads(z)).flatten(2))
        return x + self.narrow(relu(self.widen(self.between(x))))


class Painter(torch.nn.Module):
    """A transformer over the patches of a grid that paints its last picture."""

    def __init__(self, spec: Spec):
        super().__init__()
        d, pixels = spec.d_model, 3 * PATCH**2
        self.look, self.paint = torch.nn.Linear(pixels, d), torch.nn.Linear(d, pixels)
        self.place = torch.nn.Parameter(0.02 * torch.randn(PLACES, d))
        self.quadrant = torch.nn.Parameter(0.02 * torch.randn(4, d))
        self.empty = torch.nn.Parameter(0.02 * torch.randn(d))
        self.blocks = torch.nn.ModuleList(Block(d, spec.heads) for _ in range(spec.blocks))
        self.norm = torch.nn.LayerNorm(d)

    def embed(self, query: Float[Tensor, "n 3 side side"], example: Tensor | None) -> Float[Tensor, "n tokens d_model"]:
        """Return the tokens of the pictures that are there, in the order of quadrants, and those of the answer."""
        seen = query[:, None] if example is None else torch.cat([example, query[:, None]], 1)
        known = self.look(patches(seen) * 2 - 1) + self.quadrant[3 - seen.shape[1] : 3, None] + self.place
        answer = (self.empty + self.quadrant[3] + self.place).expand(len(query), 1, -1, -1)
        return torch.cat([known, answer.to(known.dtype)], 1).flatten(1, 2)

    def forward(
        self, query: Float[Tensor, "n 3 side side"], example: Float[Tensor, "n 2 3 side side"] | None = None,
        heads: At | None = None, stream: At | None = None,
    ) -> Float[Tensor, "n 3 side side"]:  # fmt: skip
        """Paint the answers. ``heads`` and ``stream`` are given a block and what stands there, and return what goes on.

        To ``heads`` that is what each head takes from the tokens that it attends to [n, tokens, heads, d_head]; to
        ``stream`` the stream after the block [n, tokens, d_model]. The answer's tokens are the last, the query's those
        before. Of the last block only the former are computed.
        """
        return self.read(self.run(self.embed(query, example), 0, None, heads, stream))

    def run(
        self, x: Float[Tensor, "n tokens d_model"], start: int, end: int | None = None, heads: At | None = None,
        stream: At | None = None,
    ) -> Float[Tensor, "n tokens d_model"]:  # fmt: skip
        """Run some blocks: those from ``start`` on, up to ``end``."""
        for number, block in enumerate(self.blocks[start:end], start):
            first = x.shape[1] - PLACES if number == len(self.blocks) - 1 else 0
            x = block(x, first, None if heads is None else partial(heads, number))
            x = x if stream is None else stream(number, x)
        return x

    def read(self, x: Float[Tensor, "n tokens d_model"]) -> Float[Tensor, "n 3 side side"]:
        """Read the answers off the last stream."""
        return pictures(self.paint(self.norm(x[:, -PLACES:])).float())


def patches(shown: Float[Tensor, "*n 3 side side"]) -> Float[Tensor, "*n places pixels"]:
    """Cut pictures into patches, row by row."""
    cut = shown.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH))  # [*n, 3, rows, y, columns, x]
    n = cut.ndim - 5
    return cut.permute(*range(n), n + 1, n + 3, n, n + 2, n + 4).flatten(-3).flatten(-3, -2)


def pictures(cut: Float[Tensor, "n places pixels"]) -> Float[Tensor, "n 3 side side"]:
    """Put patches together."""
    rows = SIDE // PATCH
    return cut.unflatten(2, (3, PATCH, PATCH)).unflatten(1, (rows, rows)).permute(0, 3, 1, 4, 2, 5).reshape(
        len(cut), 3, SIDE, SIDE)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Visual:
    """A model with what it was trained to; ``history``: what `measured` found at every stage, one row each."""

    spec: Spec
    net: Painter
    history: tuple[dict, ...] = field(default=(), repr=False)
    sha256: str = ""

    @property
    def device(self) -> torch.device:
        return self.net.empty.device


def fresh(spec: Spec) -> Visual:
    """Return an untrained model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return Visual(spec, Painter(spec))


def error(painted: Float[Tensor, "*n 3 side side"], answers: Float[Tensor, "*n 3 side side"]) -> Float[Tensor, "*n"]:
    """Return the mean squared error of every picture."""
    return (painted - answers.to(painted.device)).pow(2).mean((-3, -2, -1))


def nearest(painted: Float[Tensor, "n 3 side side"], of: Grids, asked: Int[Tensor, " n"] | None = None) -> Tensor:
    """Say of every picture if it is nearer to what ``asked`` makes of the query than to any other operation's answer.

    Where several operations give the same, none is nearer than the other.
    """
    off = error(painted[None], of.answers)
    own = off.gather(0, (of.asked if asked is None else asked)[None].to(off.device))[0]
    return own <= off.amin(0) + 1e-7


@torch.no_grad()
def measured(model: Visual, n: int, seed: int = 0) -> Iterator[dict]:
    """Measure what examples do, on ``n`` grids of held-out figures for each task of training: rows of shown, on.

    ``shown``: the right example, one of another operation, or none. ``on`` is the operation that an answer is held
    against: that of the task, or that of the wrong example.
    """
    generator = torch.Generator().manual_seed(1 << 40 | seed)
    kinds, asked = numbered(TRAINED, n)
    other = another(kinds, asked, generator)
    held = figures().split[1]
    right = grids(held, kinds, asked, generator)
    wrong = grids(held, kinds, asked, generator, other)
    for shown, on, of, example, held_against in (
        ("right", "own", right, right.example, asked), ("none", "own", right, None, asked),
        ("wrong", "own", wrong, wrong.example, asked), ("wrong", "other", wrong, wrong.example, other),
    ):  # fmt: skip
        painted = seen(model, of.query, example)
        answers = of.answers[held_against, torch.arange(len(of))]
        yield {"shown": shown, "on": on, "mse": round(error(painted, answers).mean().item(), 5),
               "nearest": round(nearest(painted, of, held_against).float().mean().item(), 4)}  # fmt: skip


def seen(model: Visual, query: Tensor, example: Tensor | None = None, **more: At) -> Float[Tensor, "n 3 side side"]:
    """Paint answers where the model is; raises VisualError for pictures of another size."""
    if query.shape[-3:] != (3, SIDE, SIDE):
        size = " by ".join(map(str, query.shape[-3:]))
        raise VisualError(f"Pictures are 3 by {SIDE} by {SIDE} (colours, rows, columns), not {size}: scale them first.")
    device = model.device
    return model.net(query.to(device), None if example is None else example.to(device), **more)


# Heads and streams


def sites(spec: Spec) -> list[tuple[int, int, int]]:
    """List what can be patched: (block, head, tokens), with tokens a place in `GROUPS`.

    What heads of the last block take to the query goes nowhere.
    """
    every = [(block, head, group) for block in range(spec.blocks) for head in range(spec.heads) for group in (0, 1)]
    return [site for site in every if site[0] < spec.blocks - 1 or GROUPS[site[2]] == "answer"]


@torch.no_grad()
def means(
    model: Visual, of: Grids, example: bool = True
) -> tuple[Float[Tensor, "blocks tokens heads d_head"], Float[Tensor, "blocks tokens d_model"]]:
    """Return means over grids, with their examples or without, of what heads give and of streams after blocks.

    The tokens are those of the query, then those of the answer; zeros stand for what the last block leaves out.
    """
    found = [], []

    def keep(where, block, x):
        mean = x[:, -2 * PLACES :].mean(0)
        where.append(torch.cat([mean.new_zeros(2 * PLACES - len(mean), *mean.shape[1:]), mean]))
        return x

    shown = of.example if example else None
    seen(model, of.query, shown, heads=partial(keep, found[0]), stream=partial(keep, found[1]))
    return torch.stack(found[0]), torch.stack(found[1])


def patched(
    model: Visual, query: Float[Tensor, "n 3 side side"], values: Tensor, masks: Float[Tensor, "n sites"]
) -> Float[Tensor, "n 3 side side"]:  # fmt: skip
    """Paint answers without example, each with what some heads give replaced; differentiable in the masks.

    ``values`` as `means` gives them, or [n, …], one for every query. ``masks``: 1 where a site is replaced, 0 where
    not, or a share between.
    """
    block, head, group = torch.tensor(sites(model.spec)).T
    share = masks.new_zeros(len(masks), model.spec.blocks, len(GROUPS), model.spec.heads)
    share = share.index_put((torch.arange(len(masks))[:, None], block, group, head), masks)
    share = share.repeat_interleave(PLACES, 2).to(model.device)

    def put(number, z):
        tokens = z.shape[1]
        return torch.lerp(z, values[..., number, -tokens:, :, :].expand_as(z), share[:, number, -tokens:, :, None])

    return seen(model, query, heads=put)


def closer(
    model: Visual, of: Grids, values: Tensor, masks: Float[Tensor, "m sites"]
) -> Float[Tensor, "m n"]:  # fmt: skip
    """Return the errors of all grids under all masks, their sign turned: a reward, differentiable in the masks."""
    m, n = len(masks), len(of)
    painted = patched(model, of.query.repeat(m, 1, 1, 1), values, masks.repeat_interleave(n, 0))
    return -error(painted.unflatten(0, (m, n)), of.answer).cpu()


def in_turns(model: Visual, of: Grids, values: Tensor, unit: Float[Tensor, " n"] | float = 1.0) -> Callable:
    """Return a reward for `heads.by_reward` that tries each mask on one grid, in turns."""

    def reward(masks: Float[Tensor, "m sites"]) -> Float[Tensor, "m n"]:
        turn = torch.arange(len(masks)) % len(of)
        painted = patched(model, of.query[turn], values if values.ndim == 4 else values[turn.to(values.device)], masks)
        off = -error(painted, of.answer[turn]).cpu()
        return torch.full((len(masks), len(of)), torch.nan).scatter(1, turn[:, None], off[:, None]) / unit

    return reward


@torch.no_grad()
def greedily(
    model: Visual, of: Grids, values: Tensor, most: int
) -> Iterator[Float[Tensor, " sites"]]:  # fmt: skip
    """Yield masks of one site more each: the one that brings the mean error down most, beside those before."""
    mask = torch.zeros(len(sites(model.spec)))
    for _ in range(most):
        tried = torch.maximum(mask, torch.eye(len(mask)))
        gain = closer(model, of, values, tried).mean(1)
        mask = tried[gain.masked_fill(mask > 0, -torch.inf).argmax()]
        yield mask


@dataclass(frozen=True)
class Painted:
    """What vectors are cleaned on, as a `cleaning.Problem`: pairs of vectors, one for every token of the query, one for
    every token of the answer, added after a block where there is no example. Losses are mean squared errors.
    """

    model: Visual
    block: int
    training: Grids
    validation: Grids

    def __post_init__(self):
        if not 0 <= self.block < self.model.spec.blocks - 1:
            last = self.model.spec.blocks - 1
            raise VisualError(f"After block {self.block} no block is left to use a vector in: take one below {last}.")

    @property
    def device(self) -> torch.device:
        return self.model.device

    def train_loss(self, vectors: Float[Tensor, "n both"], step: int) -> Float[Tensor, " n"]:
        return self.loss(vectors, self.training)

    @torch.no_grad()
    def validation_loss(self, vectors: Float[Tensor, "n both"]) -> Float[Tensor, " n"]:
        return self.loss(vectors, self.validation)

    def loss(self, vectors: Float[Tensor, "n both"], of: Grids) -> Float[Tensor, " n"]:
        painted = self.paint(vectors, of.query)
        return error(painted, of.answer).mean(1)

    def paint(
        self, vectors: Float[Tensor, "n both"], query: Float[Tensor, "grids 3 side side"]
    ) -> Float[Tensor, "n grids 3 side side"]:  # fmt: skip
        """Paint the answers without example, with each pair of vectors added."""
        net, n = self.model.net, len(vectors)
        with torch.no_grad():  # before the vector, nothing depends on it
            plain = net.run(net.embed(query.to(self.device), None), 0, self.block + 1)
        more = vectors.to(plain).unflatten(1, (len(GROUPS), -1)).repeat_interleave(PLACES, 1)
        whole = (plain + more[:, None]).flatten(0, 1)
        return net.read(net.run(whole, self.block + 1)).unflatten(0, (n, len(query)))


def pair(sae: saes.Sae) -> saes.Sae:
    """Return the SAE of a pair of vectors, laid end to end: of each the same one."""
    twice = {name: torch.block_diag(*[getattr(sae, name)] * 2) for name in ("W_enc", "W_dec")}
    twice |= {name: getattr(sae, name).repeat(2) for name in ("b_enc", "b_dec", "threshold")}
    return replace(sae, **twice)


# Files


SHELF = training.Shelf("visual model", "make visual", Spec, VisualError)


def save(model: Visual, root: str | Path = SHIPPED) -> Path:
    """Keep a model below a folder; return its own folder."""
    return SHELF.keep(Path(root) / model.spec.name, model.spec, model.history, model.net)


def load(name: str = "grids", root: str | Path = SHIPPED) -> Visual:
    """Load a visual model to where models go; raises VisualError, in one sentence, if it cannot be had."""
    return Visual(*SHELF.load(Path(root) / name, name, lambda spec: fresh(spec).net))


def sha256(root: str | Path, name: str = "grids") -> str:
    """Hash the weights of a visual model; raises VisualError if it is not there."""
    path = Path(root) / name / training.WEIGHTS
    if not path.is_file():
        raise VisualError(f"There is no visual model {visible(str(path.parent))}: `make visual` trains it.")
    return files.sha256(path)
