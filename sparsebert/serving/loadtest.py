"""Load for a server, as clients who do not wait for one another make it: requests are due at times that are drawn
before the run, and a latency counts from when its request was due. So a server that stops for a second has a second of
late answers, and not one, which is what a client that waits for each answer would see.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from sparsebert.config import LoadtestConfig
from sparsebert.errors import InputError, cut, first_line
from sparsebert.serving.key import key_of

Text = str | tuple[str, str]

OK, OVERLOADED = 200, 429
NO_ANSWER = 0  # status of a request without an answer
MOST_OPEN = 20_000  # requests without an answer; more are not sent
SETTLE = 0.2  # seconds from the beginning to the first request
LATE = 5.0  # milliseconds by which one request in a hundred may be sent too late before it is said


@dataclass(frozen=True)
class Sent:
    """A request: seconds when it was due, sent and over; status, and why there is none."""

    due: float
    sent: float
    over: float
    status: int
    why: str = ""


def loadtest(
    url: str, texts: Sequence[Text], config: LoadtestConfig, progress: Callable[[int, int, str], None]
) -> tuple[dict, list[tuple[dict, list[Sent]]]]:
    """(the server's /info, of each rate its row and its requests). url: of the server. texts: are sent in random order,
    `config.batch` per request, as often as needed.

    Raises InputError if no sparsebert server answers at the URL.
    """
    return asyncio.run(_all(url.rstrip("/"), texts, config, progress))


async def _all(url: str, texts: Sequence[Text], config: LoadtestConfig, progress):
    key = key_of(config.api_key_file)
    headers = {"content-type": "application/json"} | ({} if key is None else {"authorization": f"Bearer {key}"})
    timeout = aiohttp.ClientTimeout(total=config.timeout)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60), timeout=timeout, headers=headers
    ) as session:
        info = await _info(session, url)
        found = []
        for rate in config.rates:
            requests = await offered(session, url, bodies(texts, config.batch, config.seed), rate, config, progress)
            found.append((row(rate, config.seconds, config.batch, requests), requests))
    return info, found


async def _info(session: aiohttp.ClientSession, url: str) -> dict:
    wrong = None
    try:
        async with session.get(f"{url}/info", allow_redirects=False) as answer:
            if answer.status == 401:
                raise InputError(f"{url} wants an API key, or another one", fix="give --api-key-file FILE")
            info = await answer.json()
            if not isinstance(info, dict) or "model" not in info:
                wrong = f"its /info has status {answer.status} and no model"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError) as error:
        wrong = first_line(error)
    if wrong:
        raise InputError(f"no sparsebert server answers at {url}: {wrong}", fix="begin one: sparsebert serve DIR")
    return info


def bodies(texts: Sequence[Text], batch: int, seed: int) -> list[bytes]:
    """Bodies for /predict, of all texts in random order; a pair is a tuple."""
    order = list(texts)
    random.Random(seed).shuffle(order)
    order += itertools.islice(itertools.cycle(order), -len(order) % batch)  # so that the last is as large
    items = [[text] if isinstance(text, str) else list(text) for text in order]
    return [
        json.dumps({"inputs": items[i : i + batch], "truncate": True}).encode() for i in range(0, len(items), batch)
    ]


def due_times(rate: float, seconds: float, arrivals: str, seed: int) -> list[float]:
    """Seconds from the beginning at which requests are due."""
    if arrivals == "constant":
        return [i / rate for i in range(max(1, int(rate * seconds)))]
    draw, when, found = random.Random(seed), 0.0, []
    while (when := when + draw.expovariate(rate)) < seconds:
        found.append(when)
    return found or [0.0]


async def offered(
    session: aiohttp.ClientSession, url: str, bodies: Sequence[bytes], rate: float, config: LoadtestConfig, progress
) -> list[Sent]:
    """Sends requests at a rate, and waits for all of them."""
    times = due_times(rate, config.seconds, config.arrivals, config.seed)
    start, found, open_ = time.perf_counter() + SETTLE, [], set()

    async def one(due: float, body: bytes) -> None:
        sent = time.perf_counter() - start
        status, why = NO_ANSWER, ""
        try:
            async with session.post(f"{url}/predict", data=body, allow_redirects=False) as answer:
                await answer.read()
                status = answer.status
                if status == OK and answer.content_type != "application/json":
                    status, why = NO_ANSWER, f"an answer of {cut(answer.content_type, 40)}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            why = first_line(error)
        found.append(Sent(due, sent, time.perf_counter() - start, status, why))

    told = 0.0
    for i, due in enumerate(times):
        if (wait := start + due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        if len(open_) >= MOST_OPEN:
            found.append(Sent(due, due, due, NO_ANSWER, f"{MOST_OPEN:,} requests had no answer yet"))
            continue
        task = asyncio.ensure_future(one(due, bodies[i % len(bodies)]))
        open_.add(task)
        task.add_done_callback(open_.discard)
        if due > told + 0.5:
            told = due
            progress(i, len(times), f"{rate:g} requests/s")
            await asyncio.sleep(0)
    while open_:
        await asyncio.wait(open_)
    progress(len(times), len(times), f"{rate:g} requests/s")
    return found


def row(rate: float, seconds: float, batch: int, requests: Sequence[Sent]) -> dict:
    """What a rate came to: latencies in milliseconds, from when a request was due."""
    answered = sorted(each.over - each.due for each in requests if each.status == OK)
    refused = sorted(each.over - each.due for each in requests if each.status == OVERLOADED)
    late = sorted(each.sent - each.due for each in requests)
    other = Counter(each.why or f"status {each.status}" for each in requests if each.status not in (OK, OVERLOADED))
    length = max([seconds, *(each.over for each in requests if each.status == OK)])
    return {
        "rate": rate, "requests": len(requests), "answered": len(answered), "refused": len(refused),
        "failed": sum(other.values()), "texts_per_s": batch * len(answered) / length,
        **{f"p{name}_ms": quantile(answered, float(f"0.{name}")) for name in ("50", "90", "99", "999")},
        "max_ms": quantile(answered, 1.0), "refused_p99_ms": quantile(refused, 0.99), "late_ms": quantile(late, 0.99),
        "why": {cut(why, 100): count for why, count in other.most_common(5)},
    }  # fmt: skip


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """In milliseconds; None of nothing."""
    return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def plot(found: Sequence[tuple[dict, Sequence[Sent]]], path: Path, title: str = "") -> None:
    """Latency by the share of requests that were faster, a line per rate; with several rates also by the rate."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    several = len(found) > 1
    figure, axes = pyplot.subplots(1, 1 + several, figsize=(5 + 4.5 * several, 4), layout="constrained", squeeze=False)
    of_share, shares = axes[0][0], [0.5, 0.9, 0.99, 0.999, 0.9999]
    for line, requests in found:
        ordered = sorted(1e3 * (each.over - each.due) for each in requests if each.status == OK)
        if ordered:
            # The scale stretches the slowest: a tenth of the requests has as much room as all of them.
            x = [1 - i / (len(ordered) + 1) for i in range(1, len(ordered) + 1)]
            of_share.plot(x, ordered, label=f"{line['rate']:g} requests/s")
    most = max(line["answered"] for line, _ in found)
    of_share.set(xscale="log", yscale="log", xlim=(1, 0.7 / (most + 1)), ylabel="ms")
    of_share.set(xlabel="share of requests that were faster", title=title)
    shares = [share for share in shares if 1 - share > 0.7 / (most + 1)]
    of_share.set_xticks([1 - share for share in shares], [f"{100 * share:g} %" for share in shares])
    of_share.legend(fontsize=8)
    if several:
        of_rate = axes[0][1]
        for name in ("p50_ms", "p99_ms"):
            points = [(line["rate"], line[name]) for line, _ in found if line[name] is not None]
            of_rate.plot(*zip(*points, strict=True), marker="o", label=f"{name.removesuffix('_ms')}")
        of_rate.set(yscale="log", xlabel="requests/s", ylabel="ms")
        of_rate.legend(fontsize=8)
    for axis in axes[0]:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
