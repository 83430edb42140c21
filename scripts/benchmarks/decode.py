"""Tokens per second of 1, 4, 16 and 32 streams, 64 new tokens each: the base alone, one adapter for all, and for each
stream an adapter of its own (rank 16 on all linears). All contenders take turns; "3x PEFT" is a ratio of medians."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from figure import Figure

from benchmarks.limits import memory_bandwidth
from benchmarks.load import Load, Round
from benchmarks.peers import Peer, Setting, prompt_ids
from benchmarks.server import Server, base, import_adapters, server
from benchmarks.turns import Case, ratios, take_turns

STREAMS = (1, 4, 16, 32)
TOKENS = 64
ROUNDS = 3
BASE, ONE, ALL = "base", "one adapter", "all different"


@dataclass(frozen=True)
class Own:
    """A case of AdapterHub's, the one on the base alone that it is compared with, and what a token must read."""

    case: Case
    base: Case
    bytes_per_token: float

    def note(self, cases: list[Case], bandwidth: float) -> str:
        own = self.case.median(rate)
        limit = bandwidth / self.bytes_per_token
        compared = f"{own / self.base.median(rate):.0%} of base; {own / limit:.0%} of the memory's limit"
        return "; ".join(filter(None, (ratios(self.case, cases, rate), compared, first_token(self.case))))


def run(setting: Setting) -> list[Figure]:
    bandwidths = [memory_bandwidth()]
    prompt = prompt_ids()
    with server() as plain, server("--quantize", "int4") as int4, setting.peers(max(STREAMS)) as peers:
        own = own_cases(plain, prompt)
        what, load = named(1, BASE), Load(int4.url, int4.key)
        case = Case("", what, partial(load.round, [int4.base], TOKENS, prompt), "int4")
        own.append(Own(case, own[0].base, read_by_a_step(int4)))
        theirs = [case for peer in peers for case in peer_cases(peer, prompt)]
        take_turns([*(o.case for o in own), *theirs], ROUNDS)
    bandwidths.append(memory_bandwidth())
    notes = [(o.case, o.note(theirs, max(bandwidths))) for o in own]
    notes += [(case, first_token(case)) for case in theirs]
    figures = [Figure.of(case.name, "tok/s", case.values(rate), note) for case, note in notes]
    return [*figures, Figure.of("memory bandwidth", "GB/s", [b / 1e9 for b in bandwidths])]


def own_cases(running: Server, prompt: list[int]) -> list[Own]:
    adapters = import_adapters(running, max(STREAMS))
    models = [a["model"] for a in adapters]
    load, name, size = Load(running.url, running.key), running.base, read_by_a_step(running)
    cases: list[Own] = []
    for streams in STREAMS:
        alone: Case | None = None
        kinds = {BASE: [name] * streams, ONE: models[:1] * streams, ALL: models[:streams]}
        for kind, asked in kinds.items():
            if (streams, kind) != (1, ALL):  # which is ONE
                case = Case("", named(streams, kind), partial(load.round, asked, TOKENS, prompt))
                alone = alone or case
                read = size + len({*asked} - {name}) * adapters[0]["bytes"]
                cases.append(Own(case, alone, read / streams))
    return cases


def read_by_a_step(running: Server) -> int:
    """Bytes of the base: all, but for an input embedding that the output layer does not share, as where that is
    quantized. Of it a step reads a row for each token."""
    embedding = base().model.get_input_embeddings().weight
    whole = running.tiers()["base"]["bytes"]
    return whole - embedding.nbytes if running.quantized else whole


def first_token(case: Case) -> str:
    return f"first token {case.median(lambda r: r.first_ms):.0f} ms"


def rate(of: Round) -> float:
    return of.rate


def named(streams: int, kind: str) -> str:
    return f"{streams} stream{'s' if streams > 1 else ''}, {kind}"


def peer_cases(peer: Peer, prompt: list[int]) -> list[Case]:
    cases = []
    for streams in STREAMS:
        kind = ALL if streams > 1 else ONE
        for what, adapters in ((BASE, [None] * streams), (kind, [*range(streams)])):
            cases.append(Case(peer.name, named(streams, what), partial(peer.ask, adapters, TOKENS, prompt)))
    return cases
