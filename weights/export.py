"""Makes the model in the box from a run: its averaged weights in half precision, in a model folder.

python -m weights.export runs/box
"""

import argparse
import shutil
import sys
from pathlib import Path

import data
import sample


def main(run: str) -> None:
    model = sample.load(run, fuse=False)
    shutil.rmtree(sample.BOX, ignore_errors=True)  # configurations that are there would be kept
    sample.save_model(sample.BOX, model.network.half(), model.schedule)
    size = sum(file.stat().st_size for file in Path(sample.BOX).rglob("*") if file.is_file())
    print(f"wrote {sample.BOX}: {size / 1e6:.1f} MB, {sample.load(sample.BOX).hash}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    sys.exit(data.exit_status(lambda: main(parser.parse_args().run)))
