# Both commands set up what they need: a virtual environment with the locked, hashed packages.
PYTHON ?= python3
ENVIRONMENT := .venv
LOCK := requirements.lock
READY := $(ENVIRONMENT)/ready

.PHONY: setup notebooks tpu docs verify verify-full test quick test-slow test-gpu test-3.12 lint bench accelerator lock clean

verify: $(READY)  ## check the theory claim by claim, minutes on two cores; report in runs/theory
	$(ENVIRONMENT)/bin/python -m theory --profile quick

tpu: $(READY)  ## add the compiler for TPU, for `python -m train.plan`; JAX_PLATFORMS=cpu keeps JAX from looking for a TPU
	$(ENVIRONMENT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-tpu.lock

docs: $(READY)  ## the site, runs/docs/index.html: works from the file, without network; fails if a public name is not documented
	$(ENVIRONMENT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --require-hashes -r requirements-docs.lock
	NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(ENVIRONMENT)/bin/python -m mkdocs build --quiet

setup: $(READY)  ## only set up; then `source .venv/bin/activate`

verify-full: $(READY)  ## the same at the sizes a paper would show
	$(ENVIRONMENT)/bin/python -m theory --profile full --out runs/theory-full

test: lint quick  ## linters, types, quick tests

quick: $(READY)  ## quick tests alone; two at a time, as most of their time is single-threaded compilation
	$(ENVIRONMENT)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)  ## tests that take minutes
	$(ENVIRONMENT)/bin/python -m pytest -m "slow and not gpu"

test-gpu: $(READY)  ## tests that need an accelerator
	$(ENVIRONMENT)/bin/python -m pytest -m gpu

test-3.12:  ## the quick tests again, on Python 3.12 with JAX 0.11.2 and tokamax; TESTS=tests/test_tokamax.py only some
	$(MAKE) setup ENVIRONMENT=.venv-3.12 LOCK=requirements-3.12.lock PYTHON=$(or $(PYTHON312),python3.12)
	.venv-3.12/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

lint: $(READY)  ## ruff and mypy
	$(ENVIRONMENT)/bin/ruff check --output-format concise
	$(ENVIRONMENT)/bin/ruff format --check
	$(ENVIRONMENT)/bin/mypy

notebooks: $(READY)  ## run the notebooks and write what they show into them; minutes
	$(ENVIRONMENT)/bin/python -m tests.record_notebooks

bench: $(READY)  ## time the prefix kernel against neural-tangents
	$(ENVIRONMENT)/bin/python -m tests.bench.bench_prefix_ntk

# the Python that has the accelerator's JAX: the one that is named, else the environment's, else python3
ACCELERATED = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(ENVIRONMENT)/bin/python),$(PYTHON)),$(PYTHON))
UNPACKED := runs/accelerator/packages

accelerator:  ## all that a GPU or TPU has to show, 9 minutes; goes on where it was. PYTHON=, WHEELS=FOLDER, TINY=1
	$(if $(WHEELS),$(ACCELERATED) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade \
		--target $(UNPACKED) $(or $(wildcard $(WHEELS)/*.whl),$(error WHEELS: expected a folder of wheels, got $(WHEELS))))
	PYTHONPATH=$(UNPACKED):$$PYTHONPATH $(ACCELERATED) -m tests.bench.accelerator $(if $(TINY),--tiny)

# not neural-tangents' TensorFlow, as in pyproject.toml; and the versions that `make accelerator` ran with on GPUs
OVERRIDDEN := "tensorflow ; python_version < '0'" "tf2jax ; python_version < '0'" jax==0.11.2 jaxlib==0.11.2 flax==0.12.10

# what an extra of pyproject.toml asks for, without what the library itself does
EXTRA := import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")

lock:  ## write requirements.lock and those of 3.12, tpu and docs anew (needs uv)
	uv pip compile pyproject.toml --extra dev --universal --generate-hashes --no-emit-index-url \
		--fork-strategy fewest --python-version 3.11 \
		--custom-compile-command "make lock" --output-file requirements.lock
	printf '%s\n' $(OVERRIDDEN) | uv pip compile pyproject.toml --no-config --override - --extra dev --extra tokamax \
		--universal --generate-hashes --no-emit-index-url --fork-strategy fewest --python-version 3.12 \
		--custom-compile-command "make lock" --output-file requirements-3.12.lock
	echo libtpu | uv pip compile - --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
		--custom-compile-command "make lock" --output-file requirements-tpu.lock
	$(PYTHON) -c '$(EXTRA)' docs | uv pip compile - --no-config --constraint requirements.lock --universal --generate-hashes \
		--no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" --output-file requirements-docs.lock

clean:
	rm -rf $(ENVIRONMENT) runs

# Python compiles what is imported, when it is; pip would compile all there is, for as long as it takes to unpack
$(READY): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python >= 3.11, got %s: run make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv $(ENVIRONMENT)
	$(ENVIRONMENT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --require-hashes -r $(LOCK)
	$(ENVIRONMENT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
