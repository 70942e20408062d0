"""Plays overload against `server.py` with the default model, and prints what clients saw.

    python -m benchmarks.overload                     all scenarios: about ten minutes
    python -m benchmarks.overload --only burst,heads  two of them

Each scenario runs twice on a fresh server: right after its start, and again. "useful" is the share of the predictions
made that belong to images which clients received. Requires Linux or macOS.
"""

import http.client
import random
import re
import threading
import time
from collections.abc import Callable, Iterable

from benchmarks import common
from benchmarks.serving import awake, running

ROWS = {
    "burst": "40 clients at once, 8 images each.",
    "sustained": "40 clients for three timeouts of 30 s, 8 images each, who come again when Retry-After says so.",
    "beside": "One image that comes half a second after two requests of 64 images.",
    "greedy": "For 30 s, 8 connections of a client that ignores Retry-After, beside a client that asks for one image.",
    "heads": "For 15 s, 100 connections that send HEAD with steps from 900 to 1000, beside a client of one image.",
}
TOKENS = ("greedy-client", "polite-client", "large-client")


class Server:
    """A running server, and what its clients have seen."""

    def __init__(self, port: int):
        self.port = port
        self.lock = threading.Lock()
        self.seen: list[tuple] = []  # (status, seconds, images, name of the client)

    def ask(self, target: str, images: int = 1, client: str = "", method: str = "GET") -> tuple[int, int]:
        """Sends a request and reads the answer. Returns status and Retry-After."""
        begin = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        headers = {"Authorization": f"Bearer {client}"} if client else {}
        connection.request(method, f"/generate_sample/?n_images={images}&{target}", headers=headers)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        with self.lock:
            drawn = 0 if method == "HEAD" else images
            self.seen.append((answer.status, time.perf_counter() - begin, drawn, client))
        return answer.status, int(answer.headers.get("Retry-After", 0))

    def predictions(self) -> float:
        """Returns how many predictions the server has made."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {TOKENS[0]}"})
        page = connection.getresponse().read().decode()
        found = re.search(r"^papilio_steps_total (\S+)", page, re.MULTILINE)
        return float(found[1]) if found else 0.0


def together(work: Iterable[Callable]) -> None:
    """Runs functions in a thread each and waits for them."""
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def until(seconds: float, work: Callable) -> Callable:
    """Returns a function that repeats work(number) for a time."""

    def repeat() -> None:
        end, number = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            work(number)
            number += 1

    return repeat


def burst(server: Server) -> None:
    together([lambda i=i: server.ask(f"seed={100 * i}", images=8) for i in range(40)])


def sustained(server: Server) -> None:
    def client(number: int) -> None:
        status, seconds = server.ask(f"seed={number}", images=8)
        if status != 200:
            time.sleep(seconds)

    together([until(90, client)] * 40)


def beside(server: Server) -> None:
    def one() -> None:
        time.sleep(0.5)
        server.ask("seed=5", client=TOKENS[1])

    together([lambda: server.ask("seed=1", images=64, client=TOKENS[0]), one,
              lambda: server.ask("seed=2", images=64, client=TOKENS[2])])  # fmt: skip


def greedy(server: Server) -> None:
    impatient = until(30, lambda i: server.ask(f"seed={i}", images=8, client=TOKENS[0]))
    together([impatient] * 8 + [until(30, lambda i: server.ask(f"seed={i}", client=TOKENS[1]))])


def heads(server: Server) -> None:
    def head(number: int) -> None:
        server.ask(f"steps={random.randint(900, 1000)}&sampler=unipc", method="HEAD", client=TOKENS[0])

    polite = until(15, lambda i: server.ask(f"seed={i}", client=TOKENS[1]))
    together([until(15, head)] * 100 + [polite])


SCENARIOS = {"burst": burst, "sustained": sustained, "beside": beside, "greedy": greedy, "heads": heads}


def play(name: str, tokens: str) -> list[list[str]]:
    """Plays a scenario twice on one server. Returns the rows of the table."""
    with_tokens = name in ("beside", "greedy", "heads")
    flags = ("--timeout", "30") if name == "sustained" else ()
    flags += ("--token-file", tokens) if with_tokens else ()
    rows = []
    with running("ours", flags=flags, warm=False) as servers:
        process, port = servers["ours"]
        with awake(process):
            for when in ("after its start", "again"):
                server = Server(port)
                before = server.predictions()
                begin = time.perf_counter()
                SCENARIOS[name](server)
                taken = time.perf_counter() - begin
                rows += describe(f"{name}, {when}", server, server.predictions() - before, taken)
    return rows


def describe(name: str, server: Server, predictions: float, taken: float) -> list[list[str]]:
    rows = []
    received = 10 * sum(images for status, _, images, _ in server.seen if status == 200)
    useful = f"{received / predictions:.0%}" if predictions else ""
    for client in sorted({client for *_, client in server.seen}):
        mine = [(status, seconds) for status, seconds, _, other in server.seen if other == client]
        answered = sorted(seconds for status, seconds in mine if status == 200)
        counts = {status: sum(one == status for one, _ in mine) for status, _ in sorted(mine)}
        shown = ", ".join(f"{count} x {status}" for status, count in counts.items())
        times = f"{answered[0]:.2f} / {answered[len(answered) // 2]:.2f} / {answered[-1]:.2f}" if answered else ""
        rows.append([name, client, shown, times, useful, f"{taken:.0f}"])
    return rows


def main() -> None:
    flags = common.Parser("overload", __doc__, "rows:\n" + "\n".join(f"  {row:10}{what}" for row, what in ROWS.items()))
    flags.add_argument(
        "--only",
        type=common.some_of(ROWS),
        default=list(ROWS),
        metavar="ROWS",
        help="rows separated by commas (default: all)",
    )
    args = flags.parse_args()
    results = common.Results(flags, args)
    tokens = results.path(".tokens")
    tokens.write_text("\n".join(TOKENS) + "\n")
    rows = []
    head = ("scenario", "client", "answers", "seconds of 200: minimum / median / maximum", "useful", "seconds")
    for name in args.only:
        rows += play(name, str(tokens.resolve()))
        table = "\n".join([*common.table(head, rows), "", common.described(common.machine()), ""])
        results.write(".md", table)
        print(table, flush=True)
    results.finish()


if __name__ == "__main__":
    main()
