"""The whole check, in the order in which its parts depend on each other"""

from dataclasses import dataclass, field
from pathlib import Path

from hunyuan_vllm.check.configs import check_config, check_generation, parameters, stop_ids
from hunyuan_vllm.check.deep import check_values
from hunyuan_vllm.check.files import check_index, check_shards, list_files
from hunyuan_vllm.check.tensors import check_scales, check_tensors
from hunyuan_vllm.check.text import check_template, check_tokenizer
from hunyuan_vllm.checkpoint import Used, read_shards
from hunyuan_vllm.util.findings import Section, exit_status
from hunyuan_vllm.util.progress import Progress


@dataclass
class Report:
    """The result of a check.

    Attributes:
        parameters: of the network, and those a token uses; None where config.json does not say.
    """

    directory: Path
    sections: list[Section] = field(default_factory=list)
    stored_bytes: int = 0
    parameters: tuple[int, int] | None = None

    @property
    def sound(self) -> bool:
        return exit_status(self.sections) == 0

    def section(self, title: str) -> Section:
        self.sections.append(Section(title))
        return self.sections[-1]


def check_directory(directory: Path, progress: Progress | None = None, jobs: int = 1) -> Report:
    """Check everything in `directory` that can be checked; the tensors' data too where a progress display is given."""
    report = Report(directory)
    files = report.section("Files")
    found, index = list_files(directory, files)
    shards = read_shards(found)
    check_shards(shards, files)
    report.stored_bytes = sum(shard.size for shard in shards)
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    complete = files.sound and bool(shards)
    if index is not None:
        check_index(index, tensors, not complete, files)

    config = check_config(directory, report.section("Config"))
    if config.network is not None:
        report.parameters = parameters(config.network)
    section = report.section("Tensors")
    used: Used = {tensor: () for tensor in tensors}
    if config.network is None or config.format is None:
        section.skipped("tensors", "not compared: config.json does not describe the network")
    else:
        used = check_tensors(tensors, config, complete, section)
        if config.format.kind is not None:
            whole = {shard.file for shard in shards if not shard.fault}
            check_scales({tensor: parts for tensor, parts in used.items() if tensor.file in whole}, config, section)

    generation_section = Section("Generation")
    generation = check_generation(directory, config, generation_section)
    tokenizer = check_tokenizer(directory, config, generation, report.section("Tokenizer"))
    template = report.section("Chat template")
    if tokenizer is None:
        template.skipped("template", "not rendered: there is no tokenizer")
    else:
        check_template(directory, tokenizer, config, stop_ids(config, generation), template)
    report.sections.append(generation_section)
    if progress is not None:
        sound_shards = [shard for shard in shards if not shard.fault]
        check_values(sound_shards, used, jobs, progress, report.section("Data"))
    return report
