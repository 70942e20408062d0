# make demo    environment, a few minutes of training on synthetic butterflies, a picture: demo.png
# make test    environment, all tests with coverage
# make lint    style and format
# make lines   what there is to read: lines of code and tokens of each module

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test lint lines clean

demo: $(VENV)/run.done
	rm -rf demo
	$(BIN)/python train.py --data synthetic:2048 --classes --preset nano --steps 1000 --preview-every 250 --out demo/run
	$(BIN)/python sample.py --model demo/run --class all --guidance 2 -n 8 --scale 3 --out demo.png
	@echo "look at demo.png; go on with: $(BIN)/python sample.py --model demo/run --class monarch --film film.gif --scale 4"

test: $(VENV)/test.done
	$(BIN)/python -m pytest --cov --numprocesses auto

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lines: $(VENV)/run.done
	$(BIN)/python -m tests.lines

clean:
	rm -rf $(VENV) demo demo.png

$(VENV)/run.done: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing requirements.txt into $(VENV) (several GB on Linux, once) ..."
	$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/test.done: $(VENV)/run.done requirements-test.txt
	$(INSTALL) -r requirements-test.txt
	@touch $@
