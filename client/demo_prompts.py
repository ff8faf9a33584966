"""What the demo asks of its photo, `assets/demo.jpg`; coordinates in pixels of that file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoPrompt:
    """A prompt and its line in the table.

    Args:
        name: what a person sees there.
        points: x, y and label (1 on the object, 0 not on it).
        box: x0, y0, x1, y1.
        is_refinement: the mask of the prompt before is refined, through its token.
        is_drawn: the mask appears in the overlay.
    """

    name: str
    points: tuple[tuple[float, float, int], ...] = ()
    box: tuple[float, float, float, float] | None = None
    is_refinement: bool = False
    is_drawn: bool = True


DEMO_PROMPTS = (
    DemoPrompt("a click", points=((300, 300, 1),)),
    DemoPrompt("a box", box=(100, 100, 400, 400)),
    DemoPrompt("a click", points=((500, 300, 1),), is_drawn=False),
    DemoPrompt("... refined by a second", points=((500, 300, 1), (600, 400, 0)), is_refinement=True),
)
