# make demo        the whole loop on the built-in family; ONCE=1 ends instead of serving the page
# make test        every test        make check   lint and types        make serve   serve the shipped students
# make bench-recipes   a few recipes trained on two-dimensional data, in about a minute

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
ROOMS := models runtime export server trainers
STAMP := $(VENV)/.installed

.PHONY: install demo test bench-recipes check lint types serve clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/fewstep demo $(if $(ONCE),--once)

serve: install
	$(BIN)/fewstep serve scenes-lcm scenes-dmd2 scenes-progressive scenes-teacher

test: install
	OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

bench-recipes: install
	$(BIN)/fewstep bench recipes --quick --out build/recipes-quick

check: lint types

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot see through the editable install's import hook, so it gets a tree of links
types: install
	rm -rf build/types && mkdir -p build/types/fewstep
	for room in $(ROOMS); do ln -s ../../../$$room build/types/fewstep/$$room; done
	MYPYPATH=build/types $(BIN)/mypy -p fewstep.models -p fewstep.runtime -p fewstep.export -p fewstep.server \
		-p fewstep.trainers

clean:
	rm -rf $(VENV) build dist *.egg-info
