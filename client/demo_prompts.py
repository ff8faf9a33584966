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
    DemoPrompt("click on the shadow", points=((300, 150, 1),)),
    DemoPrompt("box around the fig", box=(422, 244, 720, 520)),
    DemoPrompt("click on the bowl", points=((820, 230, 1),), is_drawn=False),
    DemoPrompt("bowl, refined: not the fig", points=((820, 230, 1), (600, 390, 0)), is_refinement=True),
)
