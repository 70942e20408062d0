"""Makes the default model from a run: its averaged weights in half precision, as a model folder.

python -m builtin.export runs/box
"""

import argparse
import shutil
import sys
from pathlib import Path

import data
import sample


def main(run: str) -> None:
    model = sample.read_model(run)
    shutil.rmtree(sample.DEFAULT_MODEL, ignore_errors=True)  # save_model would keep its configurations
    sample.save_model(sample.DEFAULT_MODEL, model.network.half(), model.schedule)
    size = sum(file.stat().st_size for file in Path(sample.DEFAULT_MODEL).rglob("*") if file.is_file())
    print(f"wrote {sample.DEFAULT_MODEL}: {size / 1e6:.1f} MB, {sample.read_model(sample.DEFAULT_MODEL).hash}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    sys.exit(data.exit_status(lambda: main(parser.parse_args().run)))
