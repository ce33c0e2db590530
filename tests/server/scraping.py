"""What a metrics port serves, read into names, labels and values."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]


class Scrape:
    """What the metrics port serves, by name and labels."""

    def __init__(self, text: str) -> None:
        self.samples: dict[tuple[str, Labels], float] = {}
        self.types: dict[str, str] = {}
        for family in text_string_to_metric_families(text):
            self.types[family.name] = family.type
            for sample in family.samples:
                self.samples[sample.name, frozenset(sample.labels.items())] = sample.value

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.samples.get((name, frozenset(labels.items())))

    def of(self, name: str) -> dict[Labels, float]:
        """Return all series of a name, without those that count nothing."""
        return {labels: value for (own, labels), value in self.samples.items() if own == name and value}

    def series(self) -> set[tuple[str, Labels]]:
        """Return every series' name and labels."""
        return {key for key in self.samples if not key[0].endswith("_created")}


def labelled(**labels: str) -> Labels:
    """Return labels as a Scrape has them."""
    return frozenset(labels.items())
