# make demo    environment, a few minutes of training on drawn shapes, a picture: demo.png
# make test    environment, all tests with coverage
# make lint    style and format
# make lines   lines of code, without comments, docstrings and blank lines

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test lint lines clean

demo: $(VENV)/run.done
	rm -rf demo
	$(BIN)/python -m tests.shapes demo/shapes 600
	$(BIN)/python train.py --data demo/shapes --preset nano --steps 600 --warmup 50 --out demo/run \
	    --eval-every 200 --preview-every 200 --save-every 200
	$(BIN)/python sample.py --model demo/run -n 16 --out demo.png

test: $(VENV)/test.done
	$(BIN)/python -m pytest --cov

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
