"""The rows of the dataset benchmark: one run of a command."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A run of `splitsam encode` or `splitsam export`.

    Args:
        scenario: `encode` and `export` begin with nothing encoded, `encode again` and `export again` find everything.
        seconds: of the command, from its start to its end; `pass_s` without starting Python.
        per_s: images a second of that, or masks.
        sent_kib: from the command to the encoder service, everything included; `files_kib` are the images.
        image_fill, prompt_fill: images in a batch of the encoder, and prompts in one of the decoder, on average.
        read_share, ...: of the command's time, how much the services spent reading images, in the encoder's model, on
            Redis, in the decoder's model and writing masks; they overlap, and with each other's waiting.
        load_before: the machine's load average over a minute.
    """

    scenario: str
    images: int
    boxes: int
    seconds: float
    pass_s: float
    per_s: float
    sent_kib: float
    files_kib: float
    image_fill: float | None
    prompt_fill: float | None
    read_share: float
    encoder_share: float
    redis_share: float
    decoder_share: float
    write_share: float
    load_before: float
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str

    @property
    def key(self) -> tuple[str, ...]:
        """What one run measures, and a later one replaces."""
        return self.gpu, self.scenario
