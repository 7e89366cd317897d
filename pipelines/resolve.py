"""A spec with all its names looked up: local folders, content hashes, ids, and the stages they make."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from uuid import uuid4

from infra.errors import UserError
from infra.storage import Storage
from models.accelerate.registry import check as check_techniques
from models.early import check_early
from models.endpoint_client import EndpointRef
from models.facts import Score
from models.families import family_of
from models.language import LanguageRef
from models.licences import Licence, licence_of
from models.loading import GeneratorRef, read_index
from models.multimodal import MultimodalRef
from models.pack import marks
from models.parallel.degrees import Degrees, check_attention, check_layout
from models.plan import SamplerPlan
from models.source import content_sha256, resolve
from models.viewer import ViewerRef
from models.vllm import VllmRef
from pipelines.chosen_plan import with_chosen_plan
from pipelines.clip_plan import CLIPS, clip_facts
from pipelines.decomposer import decomposer_of
from pipelines.early_reject import early_reject
from pipelines.expander import Expander, expander_of
from pipelines.identity import generator_id
from pipelines.kept import kept_states
from pipelines.operating_point import OperatingPoint
from pipelines.plan_file import Chosen
from pipelines.refusals import check_licences, check_oracle
from pipelines.sampling import sampler_plan
from pipelines.spec import Spec, absolute_paths
from pipelines.teacher import teacher_of
from pipelines.viewer_refs import version_of, viewer_of
from pipelines.viewers import MODEL_BACKENDS
from stages.batch import Stage
from stages.caption import CaptionMedia
from stages.caption_schema import load_schema
from stages.decompose import DecomposePrompts
from stages.early import EarlyReject
from stages.judge import JudgeQuality
from stages.rubric import OVERALL, Rubric, check_screen, check_thresholds, load_rubric, with_decomposed
from stages.score import ScoreMedia
from stages.screen import ScreenQuality
from stages.tensors import KeptStates
from stages.write import GeneratorFacts, WriteShards

ENDPOINT_LICENCE = Licence("unknown", "unknown", "it is behind an endpoint, which states none; read its terms")


@dataclass(frozen=True)
class Resolved:
    """One run's spec, looked up. Picklable."""

    spec: Spec
    run_id: str
    storage: Storage
    plan: SamplerPlan
    generators: tuple[GeneratorRef, ...]
    facts: tuple[GeneratorFacts, ...]
    generator_ids: tuple[str, ...]
    rubric: Rubric
    decomposer: DecomposePrompts | None
    judge: ViewerRef | None
    screen: ViewerRef | None
    captioner: ViewerRef | None
    expander: Expander | None
    licences: tuple[tuple[str, Licence], ...]
    early: EarlyReject | None = None
    points: tuple[OperatingPoint, ...] = ()
    """Thresholds that were found from data (see pipelines.thresholds)."""
    chosen: Chosen | None = None
    """Where the sampler's keys are from, where `sampler.plan` says so."""

    @property
    def portable_spec(self) -> Spec:
        """The spec with the plan's keys and without its file, for machines where that does not lie."""
        sampler = self.spec.sampler.model_copy(update={"plan": None, "budget": None})
        return self.spec.model_copy(update={"sampler": sampler})

    @property
    def plan_id(self) -> str:
        """Of what, beside the prompt, is meant to change a sample: the sampler plan, or how a clip is cut out."""
        return self.facts[0].plan_id if self.spec.recipe == "curate" else self.plan.plan_id

    def again(self) -> Resolved:
        """The same as a run of its own: a run id that was swept cannot commit any more."""
        return replace(self, run_id=new_run_id())

    def scoring(self) -> tuple[Stage, ...]:
        """ScoreMedia and, unless the spec has none, the judge, with what decomposes prompts and the screen before it."""
        spec = self.spec
        score: Stage = ScoreMedia(**spec.score.model_dump())
        if spec.judge.backend == "none":
            return (score,)
        facts: Score = spec.judge.decompose.score if spec.judge.decompose else "mean"
        screen = None
        if spec.judge.screen is not None and self.screen is not None:
            screen = ScreenQuality(
                rubric=self.rubric.only(spec.judge.screen.questions),
                model=self.screen,
                reject=spec.judge.screen.reject,
                accept=spec.judge.screen.accept,
                facts=facts,
                num_frames=spec.judge.screen.num_frames,
                threads=spec.layout.threads,
            )
        judge = JudgeQuality(
            rubric=self.rubric,
            model=self.judge,
            backend=spec.judge.backend,
            call=spec.judge.call,
            version=spec.judge.version,
            thresholds=tuple(sorted(self.bars.items())),
            facts=facts,
            num_frames=spec.judge.num_frames,
            threads=spec.layout.threads,
            screen=screen,
        )
        decomposer = self.decomposer and replace(self.decomposer, cache=self.storage)
        return tuple(stage for stage in (score, decomposer, screen, judge) if stage is not None)

    def captioning(self) -> tuple[Stage, ...]:
        caption = self.spec.caption
        if caption is None or self.captioner is None:
            return ()
        local = caption.backend == "transformers"
        return (
            CaptionMedia(
                model=self.captioner,
                styles=caption.styles,
                max_new_tokens=caption.max_new_tokens,
                num_frames=caption.num_frames,
                threads=self.spec.layout.threads,
                label=self.captioner.name if isinstance(self.captioner, EndpointRef) else caption.model,
                schema=load_schema(caption.json_schema, local),
                verify=caption.verify,
                verifier=self.judge if caption.verify else None,
                plan_json=self.plan.to_json(),
            ),
        )

    def writing(self) -> Stage:
        output = self.spec.output
        return WriteShards(
            storage=self.storage,
            run_id=self.run_id,
            recipe=self.spec.recipe,
            generators=self.facts,
            layout_json=self.spec.layout.model_dump_json(),
            judge=self.judge_name,
            rubric=self.rubric_id,
            code_version=code_version(),
            keep_rejected=output.keep_rejected,
            image_format=output.image_format,
            crf=output.crf,
            marked=output.marked,
            tensors={str(role): str(dtype) for role, dtype in output.tensors.items()},
            trajectory=self.kept_states,
            with_media=self.spec.recipe != "prompts",
            compression=output.compression,
        )

    @property
    def kept_states(self) -> KeptStates | None:
        """Which states of a path are kept; None where the recipe keeps none."""
        return kept_states(self.spec)

    @property
    def asked(self) -> str:
        """What the judge's scores depend on besides the judge: the rubric's questions and what it is shown."""
        if self.spec.judge.backend == "none":
            return ""
        judge = self.spec.judge
        shown = self.rubric.questions_sha256
        for tier in (judge, judge.screen):
            if tier is not None:
                shown += f"/{tier.num_frames}" + (f"/{tier.token_drop}" if tier.token_drop else "")
        if judge.screen is not None and judge.screen.questions:
            shown += f"/{self.rubric.only(judge.screen.questions).questions_sha256}"
        if self.decomposer is not None and judge.decompose is not None:
            shown += f"/{self.decomposer.fingerprint}/{judge.decompose.score}"
        return f"{self.rubric.name}@{hashlib.sha256(shown.encode()).hexdigest()[:12]}"

    @property
    def bars(self) -> dict[str, float]:
        """The judge's thresholds that the spec says and that were found."""
        return self.spec.judge.bars | {point.question: point.threshold for point in self.points}

    @property
    def rubric_id(self) -> str:
        """What a row says of its rubric: `asked`, and after a plus sign a hash of every bound that its verdict depends on."""
        judge = self.spec.judge
        bounds = {
            "judge": self.rubric.thresholds(self.bars) if self.asked else {},
            "score": self.spec.score.model_dump(),
        }
        if self.spec.recipe == "curate":
            bounds["texture"] = self.spec.texture.model_dump()
        if OVERALL in self.bars:
            bounds["weights"] = {question.name: question.weight for question in self.rubric.questions}
        if judge.screen is not None:
            bounds["screen"] = {"reject": judge.screen.reject, "accept": judge.screen.accept}
        return f"{self.asked}+{hashlib.sha256(json.dumps(bounds, sort_keys=True).encode()).hexdigest()[:8]}"

    @property
    def judge_name(self) -> str:
        """What a row says of its judge: the model or the code, with what tells one version from another."""
        judge = self.spec.judge
        if judge.backend == "call":
            return f"{judge.call}@{judge.version}"
        if judge.backend == "oracle":
            return f"oracle@{marks.VERSION}"
        name = version_of(judge.model, self.judge) if self.judge else ""
        if judge.screen is not None and self.screen is not None:
            return f"{version_of(judge.screen.model, self.screen)}, then {name}"
        return name

    @property
    def captions_id(self) -> str:
        """What captions depend on besides captioner and clip: what is asked, shown and held to, and who verifies."""
        caption = self.spec.caption
        if caption is None or self.captioner is None:
            return ""
        (stage,) = self.captioning()
        assert isinstance(stage, CaptionMedia)
        judge = version_of(self.spec.judge.model, self.judge) if self.judge else self.captioner_name
        verifier = judge if caption.verify else ""
        dropped = [caption.token_drop, self.spec.judge.token_drop if caption.verify and self.judge else 0.0]
        # vLLM writes the JSON that a model in process fills in leaf by leaf.
        guided = ["vllm"] if caption.backend == "vllm" and "structured" in caption.styles else []
        text = json.dumps([stage.settings, verifier, dropped, *guided])
        return f"captions@{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def captioner_name(self) -> str:
        """What an annotation says of its captioner, as `judge_name`."""
        caption = self.spec.caption
        return version_of(caption.model, self.captioner) if caption and self.captioner else ""

    @property
    def needs_model(self) -> bool:
        """Whether judging or captioning computes with a model on this run's own machines."""
        refs = (self.judge, self.screen, self.captioner, self.decomposer and self.decomposer.model)
        return any(isinstance(ref, (MultimodalRef, VllmRef, LanguageRef)) for ref in refs)


def resolve_spec(spec: Spec, run_id: str | None = None, replan: bool = False) -> Resolved:
    """Look up everything a spec names. UserErrors name the key that is wrong.

    `replan`: `sampler.plan` too, whatever the dataset keeps of it.
    """
    spec = absolute_paths(spec)
    storage = storage_of(spec)
    spec, chosen = with_chosen_plan(spec, storage, replan)
    rubric = load_rubric(spec.judge.rubric)
    decomposer = decomposer_of(spec)
    if spec.judge.decompose is not None:
        rubric = with_decomposed(rubric, spec.judge.decompose.threshold)
    if spec.judge.backend in (*MODEL_BACKENDS, "oracle"):
        check_thresholds(rubric, spec.judge.bars)
        check_screen(rubric, spec.judge.screen.questions if spec.judge.screen else ())
    if spec.judge.backend == "oracle":
        check_oracle(rubric)
    plan = sampler_plan(spec.sampler)
    degrees = Degrees(**spec.layout.parallel.model_dump())
    generators, facts, ids = [], [], []
    licences: dict[str, Licence] = {}
    for at, generator in enumerate(spec.generators):
        folder = resolve(generator.model, "generator", generator.revision)
        pipeline = read_index(folder)["_class_name"]
        check_layout(folder, family_of(pipeline), degrees, guided=plan.guidance_scale > 1, blocks=plan.blocks)
        check_attention(family_of(pipeline), spec.layout.attention)
        check_techniques(
            plan,
            family_of(pipeline) if generator.remote_code is None else None,
            degrees,
            teacher=generator.teacher_steps > 0,
            compiled=spec.layout.compile,
            offloaded=spec.layout.offload != "none",
        )
        keeps = spec.output.tensors or spec.trajectory
        if family_of(pipeline) is None and (keeps or spec.output.keep_rejected == "latents"):
            key = "output.keep_rejected" if not keeps else "trajectory" if spec.trajectory else "output.tensors"
            raise UserError(
                f"{key}: {generator.model} is a {pipeline}, which runs whole and gives no latents; keep media only"
            )
        adapters = [(adapter, resolve(adapter.uri, "adapter")) for adapter in generator.adapters]
        hashes = [content_sha256(path) for _, path in adapters]
        sha256 = content_sha256(folder)
        ref = GeneratorRef(
            path=folder,
            adapters=tuple((path, adapter.weight) for adapter, path in adapters),
            dtype=spec.sampler.dtype,
            offload=spec.layout.offload,
            compile=spec.layout.compile,
            vae_tiling=spec.layout.vae_tiling,
            remote_code=generator.remote_code,
            revision=generator.revision,
            parallel=degrees,
            attention=spec.layout.attention,
            max_cache_bytes=spec.layout.max_cache_bytes if plan.accelerate else None,
        )
        if spec.sampler.early_reject is not None:
            check_early(family_of(pipeline) if generator.remote_code is None else None, ref, plan)
        if (teacher := teacher_of(at, generator, ref, plan, spec.policy)) is not None:
            ref = replace(ref, teacher=teacher)
            licences.setdefault(teacher.model, licence_of(teacher.path, teacher.model))
        fact = GeneratorFacts(
            model=generator.model,
            model_sha256=sha256,
            plan_id=plan.plan_id,
            plan_json=plan.to_json(),
            num_inference_steps=plan.num_inference_steps,
            guidance_scale=plan.guidance_scale,
            adapters=tuple(
                {"uri": adapter.uri, "sha256": digest, "weight": adapter.weight}
                for (adapter, _), digest in zip(adapters, hashes, strict=True)
            ),
        )
        weights = [(digest, adapter.weight) for (adapter, _), digest in zip(adapters, hashes, strict=True)]
        generators.append(ref)
        facts.append(fact)
        handed = () if teacher is None else (teacher.steps, (teacher.sha256, teacher.guidance_scale))
        ids.append(generator_id(sha256, weights, *handed))
        licences[generator.model] = licence_of(folder, generator.model, (generator.licence, generator.may_train))
    if spec.recipe == "curate":
        facts, ids = [clip_facts(spec)], [CLIPS]
    looking = {"judge": spec.judge, "judge.screen": spec.judge.screen, "caption": spec.caption}
    viewers = {name: viewer_of(name, section, storage) for name, section in looking.items()}
    for viewer, section in zip(viewers.values(), looking.values(), strict=True):
        if isinstance(viewer, EndpointRef):
            licences[viewer.name] = ENDPOINT_LICENCE
        elif viewer is not None and section is not None:
            licences.setdefault(section.model, licence_of(viewer.path, section.model))
    if decomposer is not None and decomposer.model is not None and spec.judge.decompose is not None:
        name = spec.judge.decompose.model or ""
        licences.setdefault(name, licence_of(decomposer.model.path, name))
    expander = expander_of(spec)
    if expander is not None and spec.prompts.expand is not None:
        licences.setdefault(spec.prompts.expand.model, licence_of(expander.stage.model.path, spec.prompts.expand.model))
    check_licences(spec, licences)
    run = Resolved(
        spec=spec,
        run_id=run_id or new_run_id(),
        storage=storage,
        plan=plan,
        generators=tuple(generators),
        facts=tuple(facts),
        generator_ids=tuple(ids),
        rubric=rubric,
        decomposer=decomposer,
        judge=viewers["judge"],
        screen=viewers["judge.screen"],
        captioner=viewers["caption"],
        expander=expander,
        licences=tuple(licences.items()),
        early=early_reject(spec, rubric, viewers["judge"], viewers["judge.screen"]),
        chosen=chosen,
    )
    run.captioning()  # refuses a schema that it cannot use
    return run


def storage_of(spec: Spec) -> Storage:
    return Storage(spec.output.uri.rstrip("/"), **spec.output.storage.model_dump())


def new_run_id() -> str:
    """Sorts by time, and is unique also among runs that start in the same second."""
    return f"{datetime.now(UTC):%Y%m%dt%H%M%S}-{uuid4().hex[:6]}"


@cache
def code_version() -> str:
    """Version of ditmill, with the commit where this is a checkout."""
    try:
        number = version("ditmill")
    except PackageNotFoundError:
        number = "0"
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return number
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return f"{number}+{found.stdout.strip()}" if found.returncode == 0 else number
