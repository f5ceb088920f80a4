.DEFAULT_GOAL := help
.PHONY: help setup clients model demo demo-gateway test run lint attack chaos bench bench-cold contract image-test audit pins clean

PYTHON ?=
export PYTHON
PY := .venv/bin/python
PINS := requirements/worker.txt requirements/engine-cpu.txt requirements/dev.txt
CONTRACT := 0.30 0.31 0.32

help: ## list these commands
	@awk -F":.*## " '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make the environment in .venv (PYTHON=/path/to/python3 picks another Python)
	@tools/setup.sh .venv $(PINS)

clients: setup ## make the environments of the clients that the gateway is tested with
	@tools/setup_clients.sh

model: setup ## make the demo model in models/
	@$(PY) tools/demo_model.py

demo: model ## send a sealed prompt through a local RunPod to the demo model (or ARGS='"yours"')
	@$(PY) tools/demo.py $(ARGS)

demo-gateway: model ## the same with the openai SDK, through the gateway
	@$(PY) tools/demo_gateway.py

test: model clients lint ## run every test, those on the real engine included (ARGS="-k word" picks some)
	@$(PY) tools/tiny_models.py
	@# Where there is no browser or no Redis to be had, the tests that need one say so.
	@tools/setup_browser.sh >/dev/null || true
	@tools/setup_redis.sh >/dev/null || true
	@# One process has the tests on the engine, which keep a core busy, the other all the rest.
	@$(PY) -m pytest -n 2 --dist loadscope $(ARGS)

run: model ## start the local RunPod with one worker of the demo model (or of MODELS=)
	@if [ -z "$$ENCRYPTION_KEY" ]; then \
		ENCRYPTION_KEY=$$($(PY) client.py keygen); \
		echo "export ENCRYPTION_KEY=$$ENCRYPTION_KEY"; \
	fi; \
	export ENCRYPTION_KEY MODELS="$${MODELS:-models/SmolLM2-135M-Instruct}"; \
	exec $(PY) local_runpod.py $(ARGS) -- $(PY) rp_handler.py

lint: setup ## check style and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy $(wildcard *.py) examples tests tools

attack: model ## try every promise of SECURITY.md as an attacker would, on the real engine
	@$(PY) tools/tiny_models.py
	@$(PY) tools/assurance.py attack $(ARGS)

chaos: model ## run hundreds of jobs while platform and machines fail (SOAK=1 adds 20 steady minutes)
	@$(PY) tools/tiny_models.py
	@$(PY) tools/assurance.py chaos -s $(ARGS)

bench: model ## measure the worker and the gateway (ARGS=--plot draws a picture)
	@$(PY) tools/bench.py $(ARGS)

bench-cold: model ## measure cold starts against vLLM's own server (ARGS="--compile --plot")
	@$(PY) tools/bench_cold.py $(ARGS)

contract: model ## run the engine's tests on each vLLM that is supported
	@$(PY) tools/tiny_models.py
	@failed=; for version in $(CONTRACT); do \
		echo "contract: vLLM $$version"; \
		tools/setup.sh .contract/vllm-$$version \
			requirements/contract-$$version.txt requirements/worker.txt requirements/dev.txt && \
		.contract/vllm-$$version/bin/python -m pytest tests/test_engine*.py $(ARGS) || \
		failed="$$failed $$version"; \
	done; \
	[ -z "$$failed" ] || { echo "contract: failed on vLLM$$failed"; exit 1; }

image-test: model ## build the CPU image with buildah, and ask the worker in it (root; Linux)
	@if tools/setup_image.sh .cache/image; then \
		$(PY) tools/tiny_models.py && $(PY) tools/image_build.py && \
		unshare --net $(PY) tools/assurance.py image-test -v $(ARGS); \
	else echo "image-test: skipped, see above"; fi

audit: setup ## compare what is installed with known vulnerabilities (DATABASE=DIR for a clone of them)
	@$(PY) tools/audit.py $(if $(DATABASE),--database "$(DATABASE)")

pins: setup ## bind requirements/constraints.txt to what is installed now
	@{ echo "# The versions of what is installed only because something else needs it, so that nothing"; \
	echo "# moves by itself. Bounds: a line here installs nothing. To move everything: empty this file,"; \
	echo "# make clean setup pins."; \
	$(PY) -m uv pip freeze --quiet --python $(PY) \
		| grep -vE '^($(shell sed -n 's/==.*//p' $(PINS) | tr _ - | paste -sd "|")|pip|uv)=='; \
	} > .venv/pins && mv .venv/pins requirements/constraints.txt

clean: ## remove what make made, the environment and the models too
	rm -rf .venv .audit .contract .clients tests/conformance/scripts/node_modules .cache models
	rm -rf bench screenshots build dist *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -exec rm -rf {} +
