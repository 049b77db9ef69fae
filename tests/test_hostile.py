"""Text of users as data: names, titles and paths that mean something to a shell, to Markdown, HTML, mathtext, globs,
format strings or YAML either work and show as themselves, or are refused in one sentence before anything runs."""

import ast
import html
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.substitution import substitution_plugin

from nb_utils import tasks
from nb_utils.record import tables
from nb_utils.show import plots
from nb_utils.text import slug, verbatim, visible
from workflow import runs

ROOT = Path(__file__).resolve().parents[1]
NASTY = [
    "$(touch INJECTED)", "a;touch INJECTED;", "`touch INJECTED`", "it's \"quoted\"", "two  spaces é", "{x} {0} {{y}}",
    "<img src=x onerror=alert(1)>", "<script>alert(2)</script>", "$x$ and $\\frac{1}{2}$",
    "\\(x\\) \\begin{a}b\\end{a}", "**bold** _it_ [link](javascript:alert(3)) ![i](x)", "# head", "- item",
    "www.example.org", "*", "[a-z]?", "-p", "~", "$HOME", "%s", "&amp; &#36;", "a: b # c", "no, yes",
    "שלום \u202eabc", "日本語 👩\u200d👧", "null\0byte", "line\nbreak", "half \ud800", "..", "a\\b", "x" * 300,
]  # fmt: skip
TITLE = "<img src=x onerror=alert(1)> $x$ {{a}} `b` *c* $(touch INJECTED); \"q\" it's שלום \u202eabc line z"
SAFE = re.compile(r"[A-Za-z0-9_-]{1,40}\.[0-9a-f]{8}")
any_text = st.text(st.characters(codec=None), max_size=60) | st.sampled_from(NASTY)
held = any_text.filter(lambda text: not re.search("[\ud800-\udfff]", text))  # by a frame
plain = settings(max_examples=150, deadline=None)


def task_file(path, **fields):
    rows = [{"input": f"w{i}", "output": f"v{i}"} for i in range(40)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**fields, "pairs": rows}))
    return path


class Shown(HTMLParser):
    """What a reader of a page sees, and the elements that it has."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.text, self.tags = "", set()
        self.feed(page)

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert not attributes, attributes


def as_page(markdown):
    """Render as a page of the book does, with all that it gives a meaning to."""
    parser = MarkdownIt("commonmark", {"html": True, "linkify": True, "typographer": False}).enable("linkify")
    return Shown(parser.use(dollarmath_plugin).use(substitution_plugin).render(markdown))


@plain
@given(any_text)
def test_any_text_shows_as_itself_in_markdown_and_in_html(text):
    shown = verbatim(text)
    for page in (as_page(f"**Task** {shown} end"), as_page(f"# Title: {shown}"), Shown(shown)):
        assert page.tags <= {"p", "strong", "h1", "span"}
        assert " ".join(visible(text).split()) in " ".join(page.text.split())


@plain
@given(any_text, any_text)
def test_any_name_becomes_a_name_of_a_file_that_follows_content(name, other):
    one = slug(name, b"one")
    assert SAFE.fullmatch(one) and one == slug(name, b"one") != slug(name, b"two")
    assert one not in tasks.names() and tables.place(one) == one
    place = tables.place(name or "a", other or "b")
    assert re.fullmatch(r"[A-Za-z0-9._+-]{1,201}", place) and not place.startswith(".")


@plain
@given(any_text, any_text)
def test_a_task_of_any_name_and_title_is_read_or_refused_in_one_line(tmp_path_factory, name, title):
    path = task_file(tmp_path_factory.getbasetemp() / "fuzz.json", name=name, title=title)
    try:
        task = tasks.load(path)
    except tasks.TaskError as error:
        assert str(error).count("\n") == 0 and "fuzz.json" in str(error)
    else:
        assert SAFE.fullmatch(task.name) and task.title == visible(task.title) and len(task.title) <= tasks.MAX_TITLE


def test_tasks_of_one_name_and_those_called_like_a_shipped_one_are_kept_apart(tmp_path):
    ours = tasks.load("antonyms")
    own = tasks.load(task_file(tmp_path / "antonyms.json"))
    named = tasks.load(task_file(tmp_path / "x.json", name="antonyms"))
    again = tasks.load(task_file(tmp_path / "copy/antonyms.json"))
    edited = tasks.load(task_file(tmp_path / "antonyms.json", title="Other"))
    assert len({ours.name, own.name, named.name, edited.name}) == 4 and own.name == again.name
    assert ours.name == "antonyms" == tasks.load(tasks.FOLDERS["word"] / "antonyms.json").name


def test_models_and_saes_of_one_name_are_kept_apart_by_what_they_hold(tmp_path):
    for folder, text in (("a/saes $(x)", "1"), ("b/saes $(x)", "2"), ("c/saes $(x)", "1")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "cfg.json").write_text(text)
    first, second, third = (tables.place("tiny", str(tmp_path / name / "saes $(x)")) for name in "abc")
    assert first == third != second and re.fullmatch(r"tiny\+saes-x\.[0-9a-f]{8}", first)
    (tmp_path / "a/saes $(x)/cfg.json").write_text("3")
    assert tables.place("tiny", str(tmp_path / "a/saes $(x)")) not in (first, second)
    assert tables.place("google/gemma-2-2b") == "google--gemma-2-2b" and tables.place() == tables.MODEL


def test_names_that_come_before_a_folder_are_those_of_the_models():
    from nb_utils import models

    assert {*tables.NAMED} == {*models.EMBEDDED, models.TINY, "random"}


@pytest.mark.parametrize("title", [TITLE, *NASTY[:-1]])
def test_a_title_shows_as_itself_in_a_figure(title):
    with plt.rc_context():
        plots.use_style()
        plt.rcParams["svg.fonttype"] = "none"
        figure, ax = plt.subplots()
        ax.set_title(f"{visible(title)}: loss")
        stream = BytesIO()
        figure.savefig(stream, format="svg")
        plt.close(figure)
    page = re.sub(rb"<style.*?</style>|<metadata>.*?</metadata>", b"", stream.getvalue(), flags=re.DOTALL)
    words = re.sub(r"<[^>]*>", "\n", page.decode())
    assert f"{visible(title)}: loss".strip() in html.unescape(words)


@plain
@given(st.lists(held, min_size=1, max_size=3), held)
def test_a_table_shows_any_text_as_itself_and_only_the_columns_that_are_ours_as_html(cells, label):
    link = [f'<a href="{i}.html">{i}</a>' for i in range(len(cells))]
    columns = {"text": cells, f"{label} label": 1.5, "link": link, "Ours": link}
    frame = pd.DataFrame(columns, index=[f"{i} {text}" for i, text in enumerate(cells)]).rename_axis(columns=label)
    page = plots.table(frame, {f"{label} label": "{:.1%}"}, index=True, html=["Ours"]).to_html()
    found = [html.unescape(re.sub("</?span>", "", cell)) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", page)]
    rows = [[f"{i} {text}", text, "150.0%", a, a] for i, (text, a) in enumerate(zip(cells, link, strict=True))]
    wanted = [label, "text", f"{label} label", "link", "Ours", *itertools.chain(*rows)]
    assert [cell for cell in found if cell.strip()] == [shown for text in wanted if (shown := visible(text)).strip()]
    assert page.count("<a href") == len(cells) and not re.search(r"[$\\]", page.partition("</style>")[2])
    assert not re.search(r"<(?!/?(style|table|thead|tbody|tr|t[hd]|a|span)[ >])", page)


STEM = "01_reconstruction_loss"
SHOWN = {"title", "origin", "licence", "x", "y", "answers"}  # attributes of tasks and pairs
GIVEN = {"task", "model", "sae_set", "token", "steered", "title", "example", "prompt"}  # names that hold text of users
ESCAPES = {"verbatim", "evidence.show", "evidence.links", "escape"}


def bare(node):
    """Yield what a piece of code shows of a user's text without escaping it."""
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name in ESCAPES or (name == "map" and ast.unparse(node.args[0]) in ESCAPES):
            return
    named = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in GIVEN
    if named or (isinstance(node, ast.Attribute) and node.attr in SHOWN):
        yield ast.unparse(node)
    for child in ast.iter_child_nodes(node):
        yield from bare(child)


def displayed(source):
    lines = "\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))
    for node in ast.walk(ast.parse(lines)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Markdown", "HTML", "display"):
            yield from (found for part in [*node.args, *node.keywords] for found in bare(part))


def test_no_notebook_shows_text_of_users_as_markup():
    for path in sorted((ROOT / "book").rglob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                assert not list(displayed(cell.source)), f"{path.name}, {cell.id}: put it into verbatim()"
    assert list(displayed('Markdown(f"{word.title}")')) == ["word.title"]
    assert list(displayed('HTML("".join(f"<p>{t}" for t in [model]))')) == ["model"]
    assert not list(displayed('Markdown(f"{verbatim(word.title)}: {len(splits.test)}")'))


# One clone in a folder of an odd name, one run in it, one page of it.


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    home = tmp_path_factory.mktemp("hostile") / "my clöne's $(touch INJECTED) {x}"
    for part in ("workflow", "data", "nb_utils", "book/experiments"):
        shutil.copytree(ROOT / part, home / part, ignore=shutil.ignore_patterns("__pycache__"))
    sizes = {"layers": "2,3", "n_prompts": 2, "n_shots": 4, "n_validation": 4, "n_test": 4, "atoms": "2,4", "seeds": 1}
    book = yaml.safe_load((home / "workflow/book.yaml").read_text())
    book |= {"parameters": {STEM: sizes}, "model": "tiny", "forked": False}
    (home / "workflow/book.yaml").write_text(yaml.safe_dump(book))
    return home


def make(home, *more, **asked):
    """Run experiment 01 as make does; return the exit code and all that is said."""
    words = [
        Path(sys.executable).with_name("snakemake"), "--snakefile", "workflow/Snakefile", "--profile",
        "workflow/profiles/local", "--cores", "1", "--until", f"run_{STEM}", *more, "--config",
        "size=book",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(home), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:replace"}
    env |= {f"BOOK_{name.upper()}": value for name, value in asked.items()}
    done = subprocess.run(words, cwd=home, env=env, capture_output=True, text=True)
    assert not [path for path in home.rglob("INJECTED")] and not (Path.cwd() / "INJECTED").exists()
    return done.returncode, done.stdout + done.stderr


def planned(said):
    return sum(map(int, re.findall(rf"^run_{STEM}\s+(\d+)$", said, re.MULTILINE)[:1]))


@pytest.fixture(scope="module")
def page(clone):
    """Return the executed copy of a task whose file, name and title are nasty."""
    name = "a, $(touch INJECTED);'\" `x` {y} é.json"
    task_file(clone / "own" / name, name=NASTY[1], title=TITLE)
    code, said = make(clone, tasks=f"own/{name}")
    assert code == 0 and "Traceback" not in said, said[-3000:]
    (found,) = clone.glob(f"results/runs/{STEM}/tiny/[!.]*.ipynb")
    assert SAFE.fullmatch(found.stem) and (clone / f"results/runs/tables/{STEM}/tiny/{found.stem}.parquet").exists()
    return found


def test_nasty_names_of_tasks_models_and_saes_are_planned_apart_and_an_edit_is_planned_again(clone, page):
    stems = [name for name in NASTY if "/" not in name and "\0" not in name and name.isprintable() and len(name) < 99]
    names = [name for name in reversed(NASTY) if name.isprintable()]  # the others are refused
    named = zip(stems[::2], names, strict=False)
    files = [task_file(clone / f"many/{stem}.json", name=name) for stem, name in named]
    files += [task_file(clone / f"{folder}/task.json", title=folder) for folder in ("one", "two")]
    listed = ",".join(str(path.relative_to(clone)) for path in files)
    folders = {"model": "models/$(touch INJECTED);' é {x}", "sae_set": "saés/`touch INJECTED` \"a\" *"}
    for folder in folders.values():
        (clone / folder).mkdir(parents=True)
        (clone / folder / "config.json").write_text("{}")
    code, said = make(clone, "-n", tasks=listed, **folders)
    assert code == 0 and planned(said) == len(files), said[-3000:]
    shipped = "own/" + next(path.name for path in (clone / "own").iterdir())
    code, said = make(clone, "-n", tasks=f"antonyms,{shipped}")
    assert code == 0 and planned(said) == 1, said[-3000:]  # the other one was run
    task_file(clone / shipped, title="Edited")
    vectors = clone / "nb_utils/vectors.py"
    vectors.write_text(vectors.read_text().replace(".mean(0)", ".mean(dim=0)"))
    assert planned(make(clone, "-n", tasks=f"antonyms,{shipped}")[1]) == 2


def test_what_is_refused_is_refused_before_anything_runs(clone):
    task_file(clone / "bad/task.json", title="x" * 300)
    code, said = make(clone, "-n", tasks="bad/task.json")
    assert code != 0 and "Nothing was run. bad/task.json: " in said and "Traceback" not in said


def test_a_run_page_of_a_nasty_task_shows_it_as_itself_and_runs_no_script(clone, page, browser):
    home = clone / "small book"
    shutil.copytree(page.parent, home / page.parent.relative_to(clone), ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(ROOT / "book", home / "book", ignore=shutil.ignore_patterns("*.ipynb", "*.md", "features"))
    shutil.copy(ROOT / "_config.yml", home)
    (home / "book/index.md").write_text("# Start\n\nHere.\n")
    chapters = [{"glob": f"results/runs/{STEM}/*/*"}]
    (home / "_toc.yml").write_text(yaml.safe_dump({"format": "jb-book", "root": "book/index", "chapters": chapters}))
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ".", "--all", "-W", "-n", "--keep-going"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    said = []
    tab = browser.new_page()
    tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    tab.goto((home / f"_build/html/{page.relative_to(clone).with_suffix('.html')}").as_uri())
    tab.wait_for_timeout(1500)
    shown = visible(TITLE)
    straight = str.maketrans("“”‘’", "\"\"''")  # the book sets quotes
    words = " ".join(tab.locator("article").inner_text().translate(straight).split())
    assert not said and tab.locator("img[src=x]").count() == 0 and tab.locator("mjx-container").count() == 0
    assert f"{' '.join(shown.split())}: 14 pairs make vectors" in words
    for heading in tab.locator("h1").all():
        assert " ".join(shown.split()) in " ".join((heading.text_content() or "").translate(straight).split())
    tab.close()


def test_what_a_run_is_of_stands_in_its_title(tmp_path):
    own = task_file(tmp_path / "own.json", title="<b> $x$")
    assert runs._described({"task": "en_es"}) == "en_es"
    assert Shown(runs._described({"task": str(own)})).text == f"<b> $x$ ({tasks.load(own).name[-8:]})"
    other = {"task": "en_es", "model": "tiny", "sae_set": "random"}
    assert Shown(runs._described(other)).text == "en_es, tiny with random"


@pytest.fixture
def makefile(tmp_path):
    for file in ("Makefile", "pyproject.toml", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / file, tmp_path)
    probe = 'probe:\n\tprintf "%s\\n" "$$BOOK_TASKS" "$$BOOK_MODEL" "$$BOOK_SAE_SET"\n'
    (tmp_path / "probe.mk").write_text(f"{probe}probe-all: TASKS = all\nprobe-all: probe\n")
    return lambda *words: subprocess.run(
        ["make", "-f", "Makefile", "-f", "probe.mk", *words], cwd=tmp_path, capture_output=True, text=True
    )


def test_what_is_asked_of_make_reaches_the_commands_as_it_is(makefile, tmp_path):
    asked = [text for text in NASTY if text.isprintable() and not text.startswith("~")]
    for tasks_, model, saes in zip(asked, asked[1:], asked[2:], strict=False):
        done = makefile("probe", f"TASKS={tasks_}", f"MODEL={model}", f"SAES={saes}")
        assert [line.rstrip() for line in done.stdout.split("\n")][:3] == [tasks_.strip(), model, saes], done.stderr
    assert makefile("probe-all").stdout.split("\n")[0] == "all"
    assert not (tmp_path / "INJECTED").exists()


@pytest.mark.parametrize("version, suits", [((3, 10), False), ((3, 99), False), (None, True)])
def test_a_given_python_is_checked_before_anything_is_installed(makefile, tmp_path, version, suits):
    """The stand-in for a Python says that it is of some version, and counts as found if it is asked to make .venv."""
    program = tmp_path / "an old python"
    told = f"import sys; sys.version_info = {version}" if version else "pass"
    program.write_text(f'#!/bin/sh\ncase "$1" in -m) touch made; exit 1;; esac\nshift; code=$1; shift\n'
                       f'exec "{sys.executable}" -c "{told}\n$code" "$@"\n')  # fmt: skip
    program.chmod(0o755)
    done = makefile(".venv/installed", f"PYTHON={program}")
    assert (tmp_path / "made").exists() == suits and not (tmp_path / ".venv").exists()
    assert ("nothing was installed" in done.stdout) != suits and "Traceback" not in done.stderr
