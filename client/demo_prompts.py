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
    DemoPrompt("a click on the shadow", points=((300, 150, 1),)),
    DemoPrompt("a box around the bowl", box=(226, 86, 1017, 690)),
    DemoPrompt("a click on the fig", points=((600, 390, 1),), is_drawn=False),
    DemoPrompt("... refined by one on its stalk", points=((600, 390, 1), (458, 327, 1)), is_refinement=True),
)
