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
    DemoPrompt("click on the left hen", points=((131, 410, 1),), is_drawn=False),
    DemoPrompt("left hen, second click", points=((131, 410, 1), (127, 189, 1)), is_refinement=True),
    DemoPrompt("box around the second hen", box=(372, 74, 566, 510)),
    DemoPrompt("box around the third hen", box=(524, 122, 720, 536)),
    DemoPrompt("click on the right hen", points=((840, 399, 1),), is_drawn=False),
    DemoPrompt("right hen, not the third", points=((840, 399, 1), (608, 375, 0)), is_refinement=True),
)
