"""What the tests of proxy fit and proxy score share."""

import random

import torch

from miniplm.config import NgramConfig, ProxyFitConfig, ProxyScoreConfig
from miniplm.stages.proxy_fit import proxy_fit
from miniplm.stages.proxy_score import proxy_score
from miniplm.training.proxies import read_manifest_of, read_proxy

EOS = 0
NGRAM = NgramConfig(buckets=4096, ridge=0.01)


def random_chunks(seed: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    topics = [rng.sample(range(1, 500), 4) for _ in range(12)]
    return [
        rng.choices(rng.choice(topics), k=rng.randint(20, 60)) + [EOS] * rng.randint(0, 1)
        for _ in range(count)
    ]


def fit(corpus, scores, output, **settings) -> None:
    proxy_fit(ProxyFitConfig(str(corpus), str(scores), str(output), **{"ngram": NGRAM, **settings}))


def predict(corpus, proxy, output, **settings) -> None:
    proxy_score(ProxyScoreConfig(str(corpus), str(proxy), str(output), **{"shard_chunks": 70, **settings}))


def load_proxy(folder):
    return read_proxy(folder, read_manifest_of(folder), torch.device("cpu"), torch.float32, 200)


class Stopped(BaseException):
    """As a kill: nothing catches it."""


def stop_at_call(monkeypatch, module, name: str, number: int) -> None:
    calls, original = [], getattr(module, name)

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == number:
            raise Stopped
        return original(*arguments)

    monkeypatch.setattr(module, name, stopping)
