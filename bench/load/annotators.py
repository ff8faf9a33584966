"""What simulated annotators do and when: a schedule made beforehand, which no answer can delay."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["encode", "click"]
KINDS: tuple[Kind, ...] = ("encode", "click")

_MOST_POINTS = 6
_SEVERAL_PROMPTS = 0.1


@dataclass(frozen=True)
class Event:
    """One request.

    Args:
        at_s: when it is sent, from the start of the schedule.
        annotator: who sends it.
        image: which of the annotator's images, in order.
        click: which click on the image; 0 begins an object, the later ones refine it.
        prompts: objects asked for at once.
        points: of each prompt.
    """

    at_s: float
    kind: Kind
    annotator: int
    image: int
    click: int = 0
    prompts: int = 1
    points: int = 1


@dataclass(frozen=True)
class Habits:
    """How annotators work.

    Args:
        clicks_per_s: of each, on average; the pauses between are exponential.
        clicks_per_image: after that many, the next image, which was sent for encoding when the last one was begun.
    """

    clicks_per_s: float = 0.5
    clicks_per_image: int = 8

    @property
    def requests_per_s(self) -> float:
        return self.clicks_per_s * (1 + 1 / self.clicks_per_image)


def plan_day(annotator: int, habits: Habits, seed: str) -> Iterator[Event]:
    """One annotator's events, without end, in order; everybody begins somewhere in the middle of an image."""
    chance = random.Random(f"{seed} {annotator}")
    at_s = chance.expovariate(habits.clicks_per_s)
    click = chance.randrange(habits.clicks_per_image)
    image = 0
    while True:
        several = chance.random() < _SEVERAL_PROMPTS
        prompts = chance.randint(2, 8) if several else 1
        yield Event(at_s, "click", annotator, image, click, prompts, min(click + 1, _MOST_POINTS))
        at_s += chance.expovariate(habits.clicks_per_s)
        click += 1
        if click == habits.clicks_per_image:
            click, image = 0, image + 1
            yield Event(at_s, "encode", annotator, image)


def plan_crowd(annotators: int, habits: Habits, seconds: float, seed: str) -> list[Event]:
    """Everybody's events of a time, in order."""
    events = []
    for annotator in range(annotators):
        for event in plan_day(annotator, habits, seed):
            if event.at_s >= seconds:
                break
            events.append(event)
    return sorted(events, key=lambda event: event.at_s)


def annotators_for(requests_per_s: float, habits: Habits) -> int:
    """How many of them send about so many requests."""
    return max(1, round(requests_per_s / habits.requests_per_s))
