# Thin names for the project's commands. `make demo` and `make test` need only Python 3.11, make and git.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/installed

# These count only where they are typed behind `make`: the environment may hold any of them for other purposes (RESET as
# a colour), and must not reset schedules or choose a version. Each goes to its command by the environment and as it was
# typed, so that quotes, spaces and $ hurt nothing; FILES, PARAMS, TESTS and ARGS are words for the shell.
GIVEN := ARGS BATCH CRON DATASET FILES MODEL PARAMS REASON REMOVE RESET TESTS TO URL VERSION WHO ZONE
take = $(if $(filter command,$(firstword $(origin $1))),$(eval override export $1 := $$(value $1)),$(eval override $1 :=))
$(foreach name,$(GIVEN),$(call take,$(name)))

# $(call if-yes,RESET,--reset): the option if RESET says yes, nothing if it says no.
if-yes = $(if $(filter 1 yes true,$($1)),$2,$(if $(filter-out 0 no false,$($1)),$(error $1 is '$($1)'; expected 1 or 0)))

.PHONY: demo run tour drop schedule notify test test-fast coverage up down status approve reject rollback history check faults year lock clean

demo: $(STAMP) ## set everything up, retrain once through the real stack, show what happened
	$(BIN)/python -m deployments.demo --start --param dataset=auto

run: $(STAMP) ## retrain once on the stack that is up: make run PARAMS="--param dataset=digits"
	$(BIN)/python -m deployments.demo $(PARAMS)

tour: $(STAMP) ## four weeks in a few minutes: good data, bad data, no data, a rollback
	$(BIN)/python -m deployments.tour

drop: $(STAMP) ## a batch arrives: make drop FILES="images-idx3-ubyte labels-idx1-ubyte" BATCH=name [DATASET=mnist]
	$(BIN)/python -m deployments.drop --batch="$$BATCH" --dataset="$${DATASET:-mnist}" $(FILES)

schedule: $(STAMP) ## a data set's own week: make schedule DATASET=name [CRON="0 3 * * 1"] [ZONE=Europe/Berlin] [REMOVE=1]
	$(BIN)/python -m deployments.schedule --dataset="$$DATASET" --cron="$$CRON" --zone="$$ZONE" \
		$(call if-yes,REMOVE,--remove)

# An address is a secret, and a command line is for everybody on the machine to read: this one as well, while it runs.
# NOTIFY_URL of the environment is not seen, nor is the line that URL=- reads from standard input; a typed URL counts first.
notify: $(STAMP) ## who is told: make notify URL=… (or NOTIFY_URL=… make notify) adds an address, without one it lists them
	$(BIN)/python -m deployments.notify

# Two processes, each with servers of its own; a third takes the cores from them and is no faster.
# With one thread each, because threads that wait for each other's core make training up to forty
# times slower.
PYTEST := -m pytest -n 2 --dist loadfile
test test-fast coverage: export OMP_NUM_THREADS := 1

test: $(STAMP) ## everything that the tests need, and the tests
	$(BIN)/python $(PYTEST) $(TESTS)

# At most a minute: no test that needs servers, trains for long or reads all of MNIST. The first 10 durations show
# which test should be marked `slow`.
test-fast: $(STAMP) ## the tests that need no server and little time
	MNIST_MIRROR= $(BIN)/python $(PYTEST) -m "not servers and not slow" --durations=10 $(TESTS)

up down status: $(STAMP) ## the local stack: start, stop, look; RESET=1 undoes what was edited in Prefect's UI
	$(BIN)/python -m deployments.stack $@ $(call if-yes,RESET,--reset)

# make approve VERSION=5 REASON="…", reject likewise, rollback REASON="…" [TO=3], history;
# each with [MODEL=digits-cnn].
approve reject rollback history: export PREFECT_API_URL ?= http://127.0.0.1:$(or $(STACK_PREFECT_PORT),4200)/api
override MODEL := $(or $(MODEL),mnist-cnn)
override WHO := $(or $(WHO),$(USER),$(shell id -un))
export MODEL REASON WHO

# $(call promote,manual,model reason): a run of promote/manual with these texts as JSON. `--param reason=…` reads a text
# as JSON if it can: "5" becomes a number, and one with quotes in it is refused.
json = import json, os, sys; print(json.dumps({name: os.environ[name.upper()] for name in sys.argv[1:]}))
promote = $(BIN)/prefect deployment run --watch promote/$1 --params "$$($(BIN)/python -c '$(json)' $2)"

approve reject: $(STAMP) ## judge the version that awaits approval
	$(call promote,manual,model reason who) --param judgement=$@ --param version="$$VERSION"

rollback: $(STAMP) ## make an earlier champion champion again
	$(call promote,rollback,model reason who) --param to="$${TO:-null}"

history: $(STAMP) ## every move of the champion, verified
	$(call promote,history,model)

# Every line of the five rooms that no test runs, those of flow runs and servers included.
coverage: $(STAMP) ## all tests, and what they leave out; a quarter slower than `make test`
	$(BIN)/coverage erase
	status=0; $(BIN)/coverage run $(PYTEST) $(TESTS) || status=$$?; \
		$(BIN)/coverage combine --quiet && $(BIN)/coverage report; exit $$status

check: $(STAMP) ## lint, spelling, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# make faults [ARGS="--part 8 --seed 3 --jobs 2"], make year [ARGS="--weeks 4 --seed 3"]. With one thread, as the tests.
faults: $(STAMP) ## the table of faults: every fault at every stage, on stacks of its own
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.table $(ARGS)

year: $(STAMP) ## 52 weeks in minutes, with planted faults: promises kept or broken, and year.png
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.year $(ARGS)

lock: $(STAMP) ## renew constraints.txt; what `make test` refuses, such as a server's log with an error, is no renewal
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras \
		--no-header --no-annotate --no-emit-index-url --output-file constraints.txt pyproject.toml

clean: ## remove the environment and caches; data of the local stack (.stack/) stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage*

# pip compiles on one core, which takes three times as long. Some packages carry templates that do
# not compile; an import compiles what is missing.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@
