"""A request's way through the decoder: embeddings, checks against the image, batches, masks, refinement tokens."""

import asyncio
import dataclasses
import functools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from splitsam.common import tracing
from splitsam.common.batcher import Batcher, Lane, Served
from splitsam.common.device_guard import DeviceGuard
from splitsam.common.metrics import Metrics
from splitsam.common.records import RecordHeader
from splitsam.common.tasks import gather_or_cancel
from splitsam.decoder_service.cutting import Cut
from splitsam.decoder_service.embeddings import Embedding, EmbeddingStore
from splitsam.decoder_service.masks import Mask, are_written_at_once, write_masks
from splitsam.decoder_service.messages import ImageMasks, ReplyBudget, Timings, check_reply_can_fit
from splitsam.decoder_service.model import PromptLogits
from splitsam.decoder_service.packing import ImageJob
from splitsam.decoder_service.prompts import (
    ImagePrompts,
    MaskFormat,
    OutputOptions,
    PredictRequest,
    Prompt,
    validate_in_image,
)
from splitsam.decoder_service.refinements import RefinementStore

# More prompts than a person makes with one click: such a request waits in the bulk lane.
_CLICK_PROMPTS = 8


class Predictor:
    """Answers requests of all callers.

    Args:
        batcher: runs image jobs of different callers together.
        batch_prompts: larger images are cut into jobs of this many prompts, so that nobody waits for all of them.
    """

    def __init__(
        self,
        batcher: Batcher[ImageJob, list[PromptLogits]],
        embeddings: EmbeddingStore,
        refinements: RefinementStore,
        guard: DeviceGuard,
        *,
        batch_prompts: int,
        format_threads: int,
        max_reply_bytes: int,
        metrics: Metrics,
    ):
        self._batcher = batcher
        self._embeddings = embeddings
        self._refinements = refinements
        self._guard = guard
        self._batch_prompts = batch_prompts
        self._max_reply_bytes = max_reply_bytes
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(format_threads, thread_name_prefix="splitsam-format")

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def predict(
        self, tenant: str, request: PredictRequest, deadline_s: float
    ) -> tuple[list[ImageMasks], Timings]:
        """The masks of every prompt of every image, in the order of the request.

        Args:
            request: checked by `validate_request`.
            deadline_s: when the caller gives up, in seconds of time.monotonic().

        Raises:
            InvalidArgument: a coordinate lies outside its image.
            EmbeddingExpired, ModelMismatch, RefinementExpired, CacheUnavailable: as the stores raise them.
            QueueFull, DeadlineTooShort, NotReady: as the batcher raises them.
            ReplyTooLarge: the masks would not fit into one reply.
        """
        start_s = time.perf_counter()
        prompts = sum(len(image.prompts) for image in request.images)
        lane = Lane.BULK if request.background or prompts > _CLICK_PROMPTS else Lane.CLICK
        self._batcher.check_room(lane=lane, tenant=tenant, deadline_s=deadline_s, weight=prompts)
        keys = [bytes.fromhex(image.embedding_key) for image in request.images]
        embeddings = await gather_or_cancel(self._embeddings.get(tenant, key) for key in keys)
        for index, (image, embedding) in enumerate(zip(request.images, embeddings, strict=True)):
            size = embedding.header.image_size
            validate_in_image(image, index, width=size.width, height=size.height)
        sizes = [embedding.header.image_size.rows_columns for embedding in embeddings]
        check_reply_can_fit(request, sizes, self._max_reply_bytes)
        resolved = await gather_or_cancel(
            self._resolve(tenant, key, image) for key, image in zip(keys, request.images, strict=True)
        )
        fetch_ms = (time.perf_counter() - start_s) * 1000
        served = await gather_or_cancel(
            self._decode(tenant, embedding, prompts, request.output, lane, deadline_s)
            for embedding, prompts in zip(embeddings, resolved, strict=True)
        )
        start_s = time.perf_counter()
        budget = ReplyBudget(self._max_reply_bytes)
        with tracing.step("write masks"):
            images = await gather_or_cancel(
                self._write(tenant, embedding.header, answers.value, request.output, budget)
                for embedding, answers in zip(embeddings, served, strict=True)
            )
        format_s = time.perf_counter() - start_s
        self._metrics.format_seconds.observe(format_s)
        queue_ms, model_ms = max(item.queue_ms for item in served), max(item.model_ms for item in served)
        return images, Timings(fetch_ms, queue_ms, model_ms, format_s * 1000)

    async def _resolve(self, tenant: str, key: bytes, image: ImagePrompts) -> list[Prompt]:
        """The image's prompts with every refinement token replaced by its logits."""

        async def resolve(prompt: Prompt) -> Prompt:
            if prompt.refinement_token is None:
                return prompt
            logits = await self._refinements.load(tenant, key, prompt.refinement_token)
            return dataclasses.replace(prompt, mask_input=logits)

        return await gather_or_cancel(resolve(prompt) for prompt in image.prompts)

    async def _decode(
        self,
        tenant: str,
        embedding: Embedding,
        prompts: Sequence[Prompt],
        output: OutputOptions,
        lane: Lane,
        deadline_s: float,
    ) -> Served[list[PromptLogits]]:
        """One image's prompts through the batcher: a click's together, more of them a job at a time."""
        jobs = [
            ImageJob(
                embedding=embedding.prepared,
                original_size=embedding.header.image_size.rows_columns,
                input_size=embedding.header.input_size.rows_columns,
                prompts=tuple(prompts[start : start + self._batch_prompts]),
                selection=output.selection,
                cut=Cut(output.mask_threshold),
                on_host=output.refinement_tokens or MaskFormat.LOW_RES_LOGITS in output.formats,
            )
            for start in range(0, len(prompts), self._batch_prompts)
        ]
        submit = functools.partial(self._batcher.submit, deadline_s=deadline_s, lane=lane, tenant=tenant)
        if lane is Lane.CLICK:
            served = await gather_or_cancel(submit(job, begun=number > 0) for number, job in enumerate(jobs))
            queue_ms = served[0].queue_ms  # the others follow it
        else:
            served = [await submit(job, begun=number > 0) for number, job in enumerate(jobs)]
            queue_ms = sum(item.queue_ms for item in served)
        answers = [answer for item in served for answer in item.value]
        return Served(answers, queue_ms, sum(item.model_ms for item in served))

    async def _write(
        self,
        tenant: str,
        header: RecordHeader,
        answers: Sequence[PromptLogits],
        output: OutputOptions,
        budget: ReplyBudget,
    ) -> ImageMasks:
        """One image's masks in the formats asked for, made on a thread if that takes time."""
        input_size, original_size = header.input_size.rows_columns, header.image_size.rows_columns

        def write(answer: PromptLogits) -> tuple[Mask, ...]:
            masks = []
            with self._guard.watch():
                for mask in write_masks(answer, input_size=input_size, original_size=original_size, output=output):
                    budget.spend(mask)
                    masks.append(mask)
            return tuple(masks)

        loop = asyncio.get_running_loop()
        prompts = []
        for answer in answers:
            at_once = are_written_at_once(answer, output)
            masks = write(answer) if at_once else await loop.run_in_executor(self._threads, write, answer)
            if output.refinement_tokens:
                masks = await self._keep_logits(tenant, header, answer, masks)
            prompts.append(masks)
        return ImageMasks(header.address.key.hex(), original_size, header.orientation, tuple(prompts))

    async def _keep_logits(
        self, tenant: str, header: RecordHeader, answer: PromptLogits, masks: tuple[Mask, ...]
    ) -> tuple[Mask, ...]:
        """The masks with refinement tokens."""
        logits = answer.logits
        if logits.device.type != "cpu":  # of a GPU without our kernels, whose logits stay where masks are cut from them
            logits = await asyncio.to_thread(logits.cpu)

        kept = []
        for mask, row in zip(masks, logits, strict=True):
            token = self._refinements.save(tenant, header, mask.mask_index, row)
            kept.append(dataclasses.replace(mask, refinement_token=token))
        return tuple(kept)
