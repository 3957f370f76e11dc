"""How well do characters predict? Held-out bits per character of a character 5-gram model, the demo model's baseline.

Interpolated modified Kneser-Ney (Chen and Goodman 1999), discounts from the counts of counts of each order. It is
trained on the text that the demo model is trained on (its validation lines too) and measured on the same characters:
those of each held-out line and one for its end. One start symbol stands before a line and is never predicted; n-grams
that begin with it keep their plain counts, because nothing can stand before them. Needs 1.1 GB of memory and a quarter
of a minute.

    python benchmarks/char_ngram.py --corpus CORPUS --json benchmarks/results/char_ngram.json
"""

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from kogpt_jax.demo import data

ORDER = 5
_START, _END, _UNKNOWN, _FIRST = 0, 1, 2, 3  # ids; characters of the training text follow
# A character that the training text lacks gets its equal share of the unknown symbol's probability.
_NUM_SCALAR_VALUES = 0x110000 - 0x800


@dataclasses.dataclass(frozen=True)
class _Order:
    """The n-grams of one length. An n-gram's key is its ids as digits, so the key of its context is ``key // base``."""

    keys: np.ndarray  # [n-grams] int64, sorted
    discounted: np.ndarray  # [n-grams] f64: count less discount, by the context's total
    contexts: np.ndarray  # [contexts] int64, sorted
    backoffs: np.ndarray  # [contexts] f64: what the discounts leave to the lower order


class CharNgram:
    """The model: one table an order, from ``ORDER`` down to 1."""

    def __init__(self, lines: Sequence[str]) -> None:
        codes = np.unique(np.concatenate([_code_points(line) for line in lines]))
        self.codes = codes
        self.base = len(codes) + _FIRST
        if self.base**ORDER >= 2**63:
            raise ValueError(f"{len(codes)} different characters: {ORDER} of them do not fit a 64-bit key")
        windows = self._windows(lines)
        self.orders: dict[int, _Order] = {}
        longer: np.ndarray | None = None
        for order in range(ORDER, 0, -1):
            keys, counts = np.unique(self._keys(windows, order), return_counts=True)
            if longer is not None:
                # How many different symbols stand before it, for all but those that begin a line.
                suffixes, num_before = np.unique(longer % self.base**order, return_counts=True)
                begins_line = keys // self.base ** (order - 1) == _START
                counts = np.where(begins_line, counts, _lookup(suffixes, num_before, keys, 0))
            self.orders[order] = self._discounted(keys, counts)
            longer = keys

    def bits(self, lines: Sequence[str]) -> np.ndarray:
        """``-log2 p`` of every character of the lines and of each line's end."""
        windows = self._windows(lines)
        targets = windows[:, -1]
        # Order 0: every known symbol and the unknown one alike.
        probs = np.full(len(targets), 1 / (self.base - 1))
        for order in range(1, ORDER + 1):
            table = self.orders[order]
            keys = self._raw_keys(windows, order)
            backoffs = _lookup(table.contexts, table.backoffs, keys // self.base, 1.0)
            longer_probs = _lookup(table.keys, table.discounted, keys, 0.0) + backoffs * probs
            # A context that reaches beyond the line's start says no more than the one that begins there.
            probs = np.where(self._is_whole(windows, order), longer_probs, probs)
        num_unseen = _NUM_SCALAR_VALUES - len(self.codes)
        return -np.log2(np.where(targets == _UNKNOWN, probs / num_unseen, probs))

    def _windows(self, lines: Sequence[str]) -> np.ndarray:
        """Each predicted symbol after the ``ORDER - 1`` before it, int16 [symbols, ORDER], start symbols in front."""
        start = np.full(ORDER - 1, _START, np.int16)
        end = np.array([_END], np.int16)
        stream = np.concatenate([part for line in lines for part in (start, self._ids(line), end)])
        windows = np.lib.stride_tricks.sliding_window_view(stream, ORDER)
        return windows[windows[:, -1] != _START]

    def _ids(self, line: str) -> np.ndarray:
        codes = _code_points(line)
        index = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        return np.where(self.codes[index] == codes, index + _FIRST, _UNKNOWN).astype(np.int16)

    def _is_whole(self, windows: np.ndarray, order: int) -> np.ndarray:
        """Whether the last ``order`` symbols hold at most one start symbol."""
        return np.ones(len(windows), bool) if order < 3 else windows[:, -order + 1] != _START

    def _keys(self, windows: np.ndarray, order: int) -> np.ndarray:
        return self._raw_keys(windows[self._is_whole(windows, order)], order)

    def _raw_keys(self, windows: np.ndarray, order: int) -> np.ndarray:
        keys = np.zeros(len(windows), np.int64)
        for column in range(ORDER - order, ORDER):
            keys = keys * self.base + windows[:, column]
        return keys

    def _discounted(self, keys: np.ndarray, counts: np.ndarray) -> _Order:
        n1, n2, n3, n4 = (int((counts == count).sum()) for count in (1, 2, 3, 4))
        if not min(n1, n2, n3, n4):
            raise ValueError(f"too little text: {n1}, {n2}, {n3} and {n4} n-grams are seen 1, 2, 3 and 4 times")
        y = n1 / (n1 + 2 * n2)
        by_count = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        discounts = by_count[np.minimum(counts, 3)]
        contexts, first = np.unique(keys // self.base, return_index=True)
        totals = np.add.reduceat(counts, first).astype(np.float64)
        backoffs = np.add.reduceat(discounts, first) / totals
        per_key = np.repeat(totals, np.diff(np.append(first, len(keys))))
        return _Order(keys, (counts - discounts) / per_key, contexts, backoffs)


def _code_points(line: str) -> np.ndarray:
    return np.frombuffer(line.encode("utf-32-le"), np.uint32)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, default: float) -> np.ndarray:
    """``values`` where ``wanted`` is among the sorted ``keys``, else ``default``."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], default)


def run(corpus: pathlib.Path) -> dict[str, Any]:
    """Trains on the training files, measures on the held-out file."""
    begin = time.perf_counter()
    model = CharNgram([line for name in data.TRAIN_FILES for line in data.read_lines(corpus / name)])
    heldout = data.read_lines(corpus / data.HELDOUT_FILE)
    bits = model.bits(heldout)
    known = set(map(chr, model.codes.tolist()))
    return {
        "order": ORDER,
        "smoothing": "interpolated modified Kneser-Ney",
        "character_types": len(model.codes),
        "ngrams": {str(order): len(table.keys) for order, table in sorted(model.orders.items())},
        "heldout": {
            "documents": len(heldout),
            "characters": len(bits),
            "unknown_characters": sum(character not in known for line in heldout for character in line),
            "bits_per_char": round(float(bits.mean()), 4),
        },
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> None:
    """Prints the result; with ``--json`` writes it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True, help="folder of the corpus' text files")
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    arguments = parser.parse_args()
    text = json.dumps(run(arguments.corpus), indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
