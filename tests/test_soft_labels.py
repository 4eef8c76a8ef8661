"""The store of soft labels: what is written is read again, what is damaged is refused, what was stopped resumes."""

import hashlib
import json
import math
import pickle
import resource
import tempfile
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from quant.choices import COMPRESSIONS
from quant.distill import distillation_loss, soft_cross_entropy
from quant.errors import InputError
from quant.label_compression import compress, expand
from quant.soft_label_format import Crop, SoftLabelHeader
from quant.soft_label_writer import SoftLabelWriter, partial_of
from quant.soft_labels import SoftLabels, is_soft_labels

HEADER = SoftLabelHeader(
    images=7, crops=3, classes=10, compression="marginal_smoothing", top_k=5, temperature=1.0, teacher="teacher",
    teacher_sha256="ab" * 32, split="train", data_sha256="cd" * 32, skip_broken=False, input_size=(3, 32, 32),
    mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616), interpolation="bicubic", scale=(0.08, 0.936),
    ratio=(0.75, 1.3333), flip=0.5, seed=0, batch_size=4, device="cpu",
)  # fmt: skip


def logits_of(count, classes=10, seed=0, spread=3.0):
    """Random logits (count, classes)."""
    return spread * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def crops_of(count, seed=0):
    """Random boxes, among them the largest that there can be."""
    rows = torch.randint(0, 2**15, (count, 5), generator=torch.Generator().manual_seed(seed)).tolist()
    crops = [Crop(top, left, max(height, 1), max(width, 1), flip % 2 == 1) for top, left, height, width, flip in rows]
    return [Crop(2**15 - 1, 2**15 - 1, 2**15 - 1, 2**15 - 1, True), *crops[1:]]


def write(path, header, *, stop=None):
    """Write random labels by the header's batches; the crops, and what was kept of them. `stop`: crops before it."""
    logits, crops = logits_of(header.records, header.classes), crops_of(header.records)
    kept, classes = compress(logits, compression=header.compression, top_k=header.top_k)
    with closing(SoftLabelWriter(path, header)) as writer:
        for start in range(writer.done, stop or header.records, header.batch_size):
            part = slice(start, min(start + header.batch_size, header.records))
            fingerprints = [2**32 - 1 - n // header.crops for n in range(header.records)[part]]
            writer.append(fingerprints, crops[part], kept[part], classes[part])
        if stop is None:
            writer.finish()
    return crops, kept, classes


def by_definition(row, compression, top_k):
    """The label of one row of logits, in plain Python."""
    powers = [math.exp(value - max(row)) for value in row]
    p = [power / sum(powers) for power in powers]
    order = sorted(range(len(row)), key=lambda c: -p[c])
    if compression == "full":
        return p
    if compression == "hard":
        return [float(c == order[0]) for c in range(len(row))]
    kept = order[: 1 if compression == "smoothing" else top_k]
    total = sum(p[c] for c in kept)
    if compression == "marginal_renorm":
        return [p[c] / total if c in kept else 0.0 for c in range(len(row))]
    rest = (1 - total) / (len(row) - len(kept)) if len(kept) < len(row) else 0.0
    return [p[c] if c in kept else rest for c in range(len(row))]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("top_k", [1, 5, 10])
def test_a_compressed_label_is_its_definition(compression, top_k):
    """To the rounding of float16; every label is a distribution, whatever was rounded."""
    logits = logits_of(20)
    kept, classes = compress(logits, compression=compression, top_k=top_k)
    labels = expand(kept, classes, compression=compression, classes=10)
    expected = torch.tensor([by_definition(row, compression, top_k) for row in logits.tolist()])
    torch.testing.assert_close(labels, expected, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(20))
    assert (labels >= 0).all()
    assert kept.dtype == torch.float16


@settings(max_examples=200)
@given(
    seed=st.integers(0, 10_000), sure=st.floats(0, 45), spread=st.floats(0, 8), top_k=st.sampled_from([1, 2, 5, 10]),
    classes=st.sampled_from([10, 11, 1000]), temperature=st.sampled_from([0.5, 1.0, 4.0]),
)  # fmt: skip
def test_every_probability_is_as_exact_as_float16(seed, sure, spread, top_k, classes, temperature):
    """Off by at most K 2^-11 of itself, p_1 and the rest too, from a teacher that knows nothing to one that is sure.

    Below 2^-29 by what the smallest float16 is; against float64, with the rounding of float32 at the end.
    """
    logits = logits_of(4, classes, seed=seed, spread=spread).double()
    logits[:, seed % classes] += sure
    p = (logits / temperature).softmax(dim=1)
    kept, indices = compress(logits, compression="marginal_smoothing", top_k=top_k, temperature=temperature)
    labels = expand(kept, indices, compression="marginal_smoothing", classes=classes).double()
    rest = p.scatter(1, indices, 0.0).sum(dim=1, keepdim=True)
    expected = (rest / max(classes - top_k, 1)).repeat(1, classes).scatter(1, indices, p.gather(1, indices))
    bound = (top_k * 2**-11 + 2**-21) * expected + 2**-40
    assert ((labels - expected).abs() <= bound).all(), ((labels - expected).abs() / expected).max()


def test_the_rest_of_a_sure_teacher_is_kept():
    """Where p_1 rounds to 1 in float16 the others still share what is left, to a twentieth of a percent."""
    logits = torch.zeros(1, 1000)
    logits[0, 7] = 20.0
    labels = expand(*compress(logits, compression="smoothing"), compression="smoothing", classes=1000)
    left = 999 / (999 + math.exp(20))
    assert left < 2**-12
    assert labels[0, 0].item() == pytest.approx(left / 999, rel=2**-11)
    assert labels[0, 7].item() == pytest.approx(1 - left, rel=1e-7)


def test_the_temperature_softens_what_is_kept():
    """Probabilities are those of the logits over T; the classes stay the likeliest ones."""
    logits = logits_of(20)
    kept, classes = compress(logits, compression="marginal_smoothing", top_k=3, temperature=4.0)
    expected, indices = (logits / 4).softmax(dim=1).topk(3)
    labels = expand(kept, classes, compression="marginal_smoothing", classes=10)
    torch.testing.assert_close(labels.gather(1, indices), expected, rtol=3 * 2**-11, atol=0)
    assert torch.equal(classes, indices)


def test_classes_that_vanish_in_float32_keep_their_order():
    """A teacher that is sure gives the others a probability of 0, but still the next best class is the next."""
    _, classes = compress(torch.tensor([[900.0, 300.0, 0.0, 400.0]]), compression="marginal_renorm", top_k=3)
    assert classes.tolist() == [[0, 3, 1]]


def test_the_loss_is_the_mean_cross_entropy_over_images_and_crops():
    """-1/(NM) sum_i sum_j p_T . log p_S, in plain Python."""
    student, teacher = logits_of(6, seed=1), logits_of(6, seed=2).softmax(dim=1)
    total = 0.0
    for row, p in zip(student.tolist(), teacher.tolist(), strict=True):
        normalizer = math.log(sum(map(math.exp, row)))
        total -= sum(p_c * (value - normalizer) for p_c, value in zip(p, row, strict=True))
    assert soft_cross_entropy(student, teacher).item() == pytest.approx(total / 6, rel=1e-6)


@given(seed=st.integers(0, 100), temperature=st.floats(0.2, 10))
def test_the_gradient_is_that_of_distillation_from_the_same_teacher(seed, temperature):
    """The two terms differ by T^2 times the teacher's entropy, in which the student does not appear."""
    student, teacher = logits_of(4, seed=seed).double().requires_grad_(), logits_of(4, seed=seed + 1).double()
    p = (teacher / temperature).softmax(dim=1)
    soft = soft_cross_entropy(student, p, temperature=temperature)
    kd = distillation_loss(student, teacher, temperature=temperature)
    entropy = -(p * p.log()).sum(dim=1).mean()
    torch.testing.assert_close(soft - temperature**2 * entropy, kd, rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (soft, kd)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_hard_labels_give_the_ordinary_cross_entropy():
    """With the likeliest class alone the term is cross-entropy with the teacher's decision."""
    student, teacher = logits_of(8, seed=3), logits_of(8, seed=4)
    labels = expand(*compress(teacher, compression="hard"), compression="hard", classes=10)
    torch.testing.assert_close(soft_cross_entropy(student, labels), F.cross_entropy(student, teacher.argmax(dim=1)))


@pytest.mark.parametrize(
    ("teacher", "temperature", "message"),
    [((4, 9), 1.0, "one shape"), ((1, 10), 1.0, "one shape"),
     ((4, 10), 0.0, "`temperature` must be > 0"), ((4, 10), -1.0, "`temperature` must be > 0")],
)  # fmt: skip
def test_what_is_no_distillation_is_refused(teacher, temperature, message):
    """Labels of other classes do not broadcast in silence; a temperature is above 0."""
    with pytest.raises(ValueError, match=message):
        soft_cross_entropy(torch.zeros(4, 10), torch.full(teacher, 0.1), temperature=temperature)


@settings(max_examples=30)
@given(
    images=st.integers(1, 6), crops=st.integers(1, 5), batch=st.integers(1, 9), seed=st.integers(0, 100),
    compression=st.sampled_from(COMPRESSIONS), classes=st.sampled_from([6, 300, 70_000]),
)  # fmt: skip
def test_what_is_written_is_read_again(images, crops, batch, compression, classes, seed):
    """Every crop to the bit, in any order, whatever the batches and however many classes."""
    if compression == "full":
        classes = min(classes, 300)
    top_k = 5 if compression.startswith("marginal") else 0
    header = replace(HEADER, images=images, crops=crops, classes=classes, compression=compression, top_k=top_k,
                     batch_size=batch, seed=seed)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels"
        written, kept, indices = write(path, header)
        labels = SoftLabels(path)
        assert labels.header == header
        order = torch.randperm(header.records, generator=torch.Generator().manual_seed(seed)).tolist()
        stored = {n: labels.crop(*divmod(n, crops)) for n in order}
        for n, each in stored.items():
            assert each.crop == written[n]
            assert torch.equal(torch.tensor(each.kept, dtype=torch.float16), kept[n])
            assert list(each.classes) == indices[n].tolist()
            assert labels.fingerprint(n // crops) == 2**32 - 1 - n // crops
        expected = expand(kept, indices, compression=compression, classes=classes)
        assert torch.equal(labels.distributions([stored[n] for n in range(header.records)]), expected)
        assert not partial_of(path).exists()


@pytest.mark.parametrize("crops", [1, 4, 500])
def test_a_crop_takes_at_most_32_bytes(crops, tmp_path):
    """At K = 5 and ImageNet's classes, its image's fingerprint counted in; header and checksum aside."""
    header = replace(HEADER, images=2, crops=crops, classes=1000)
    write(tmp_path / "labels", header)
    content = (tmp_path / "labels").stat().st_size - len(header.line) - 32
    assert content / header.records == 28 + 4 / crops <= 32


def test_a_copy_for_a_worker_reads_the_same(tmp_path):
    """Pickled, it opens the file again: the memory map itself cannot travel."""
    write(tmp_path / "labels", HEADER)
    labels = SoftLabels(tmp_path / "labels")
    copy = pickle.loads(pickle.dumps(labels))
    assert copy.crop(6, 2) == labels.crop(6, 2)
    assert (copy.sha256, copy.header) == (labels.sha256, labels.header)


@pytest.mark.parametrize("place", [(7, 0), (0, 3), (-1, 0), (0, -1)])
def test_a_crop_that_is_not_there_is_no_other_one(place, tmp_path):
    """An index beyond the end, or below 0, does not read a neighbour."""
    write(tmp_path / "labels", HEADER)
    with pytest.raises(IndexError, match="3 of 7 images"):
        SoftLabels(tmp_path / "labels").crop(*place)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a file."""
    path = tmp_path_factory.mktemp("whole") / "labels"
    write(path, HEADER)
    return path.read_bytes()


@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(whole, share, bit):
    """In the header, a fingerprint, a crop or the checksum itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels"
        content = bytearray(whole)
        content[int(share * len(content))] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"damaged|is no file of soft labels"):
            SoftLabels(path)


@given(share=st.floats(0, 1, exclude_max=True))
def test_any_cut_is_found(whole, share):
    """However much is left of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels"
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match=r"cut short|is no file of soft labels"):
            SoftLabels(path)


def changed(whole, **fields):
    """The file's content before the checksum, with other entries in its header."""
    line, _, body = whole[:-32].partition(b"\n")
    return json.dumps(json.loads(line) | fields).encode() + b"\n" + body


FORGED = {
    "an unknown entry": (lambda whole: changed(whole, x=1), "first line is no header"),
    "no entry": (lambda whole: b'{"format": "qvw-soft-labels", "version": 2, "crops": 1}\n', "first line is no header"),
    "no line": (lambda whole: whole[:-32].replace(b"\n", b" ", 1), "first line is no header"),
    "a word for a number": (lambda whole: changed(whole, crops="x"), "first line is no header"),
    "words for numbers": (lambda whole: changed(whole, mean=["x", 0, 0]), "first line is no header"),
    "a number beyond all": (lambda whole: changed(whole, temperature=10**400), "first line is no header"),
    "a list": (lambda whole: whole[:-32].replace(b'"images": 7', b'"images": ' + b"[" * 100_000, 1), "is no header"),
    "no compression": (lambda whole: changed(whole, compression="zip"), "first line is no header"),
    "not a number": (lambda whole: changed(whole, flip=math.nan), "first line is no header"),
    "fewer than none": (lambda whole: changed(whole, top_k=-1), "first line is no header"),
    "other crops": (lambda whole: changed(whole, crops=99), "as many bytes as the images and crops"),
    "a short body": (lambda whole: whole[:-60], "as many bytes as the images and crops"),
    "a long body": (lambda whole: whole[:-32] + b"x", "as many bytes as the images and crops"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(FORGED))
def test_a_forged_file_is_refused(whole, case, tmp_path):
    """The checksum is right, the header is not: said where the file is opened, not by a training that reads it."""
    forge, message = FORGED[case]
    content = forge(whole)
    (tmp_path / "labels").write_bytes(content + hashlib.sha256(content).digest())
    with pytest.raises(InputError, match=rf"labels are cut short or damaged: .*{message}.* Fetch the file again"):
        SoftLabels(tmp_path / "labels")


def test_whole_numbers_in_a_header_are_numbers(tmp_path):
    """A mean of 0 and a standard deviation of 1, as some networks state them, are read as they were written."""
    header = replace(HEADER, mean=(0, 0, 0), std=(1, 1, 1), temperature=1)
    write(tmp_path / "labels", header)
    assert SoftLabels(tmp_path / "labels").header == header


@contextmanager
def files_of_at_most(size):
    """No file of this process can grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.1, 0.8, 0.99])
def test_a_writer_without_room_raises_once(whole, share, tmp_path):
    """Header, batch or checksum, whatever finds no room: closing raises nothing more, and with room it resumes."""
    path = tmp_path / "labels"
    with files_of_at_most(int(share * len(whole))), pytest.raises(OSError, match="File too large") as raised:
        write(path, HEADER)
    assert raised.value.__context__ is None  # nothing else was on its way
    write(path, HEADER)
    assert path.read_bytes() == whole


def test_what_is_no_such_file_is_named(tmp_path):
    """Another file, one of an earlier or later version, none at all."""
    (tmp_path / "other").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(InputError, match="other is no file of soft labels"):
        SoftLabels(tmp_path / "other")
    assert not is_soft_labels(tmp_path / "other")
    write(tmp_path / "later", HEADER)
    content = (tmp_path / "later").read_bytes()
    for version in (b"1", b"3", b"20"):
        (tmp_path / "later").write_bytes(content.replace(b'"version": 2,', b'"version": %b,' % version, 1))
        with pytest.raises(InputError, match=r"later was made by another version.*format 2 here"):
            SoftLabels(tmp_path / "later")
    with pytest.raises(InputError, match="absent cannot be read: No such file"):
        SoftLabels(tmp_path / "absent")


@given(left=st.floats(0, 1), corrupt=st.integers(0, 40))
def test_a_stopped_writer_goes_on_to_the_same_bytes(whole, left, corrupt):
    """Killed at any byte, within the header too; the last bytes of the last batch may even be wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "path"
        size = int(left * (len(whole) - 1))
        begun = bytearray(whole[:size])
        corrupt = min(corrupt, max(0, size - len(HEADER.line)))
        begun[size - corrupt :] = bytes(corrupt)
        partial_of(path).write_bytes(begun)
        write(path, HEADER)
        assert path.read_bytes() == whole


def test_a_stopped_writer_keeps_what_was_done(tmp_path):
    """It resumes from the last batch but one: nothing before is asked again; until the end there is no file."""
    path = tmp_path / "labels"
    write(path, HEADER, stop=16)
    assert not path.exists()
    writer = SoftLabelWriter(path, HEADER)
    writer.close()
    assert writer.done == 12


def test_a_beginning_of_other_labels_is_refused(tmp_path):
    """With what differs; a file of that name that is none of ours stays as it is."""
    path = tmp_path / "labels"
    write(path, HEADER, stop=8)
    other = replace(HEADER, seed=3, teacher_sha256="ef" * 32)
    message = r"labels\.partial was begun with other inputs \(other weights of the teacher, seed: 0 -> 3\)"
    with pytest.raises(InputError, match=message):
        SoftLabelWriter(path, other)
    begun = partial_of(path).read_bytes()
    partial_of(path).write_bytes(begun.replace(b'"version": 2,', b'"version": 1,', 1))
    with pytest.raises(InputError, match=r"labels\.partial was made by another version"):
        SoftLabelWriter(path, HEADER)
    partial_of(path).write_bytes(b"my notes\n")
    with pytest.raises(InputError, match=r"begun with other inputs\. "):
        SoftLabelWriter(path, HEADER)
    assert partial_of(path).read_bytes() == b"my notes\n"


def test_an_incomplete_file_is_never_put_in_place(tmp_path):
    """A writer that ends too early raises: a defect, not a shorter file."""
    writer = SoftLabelWriter(tmp_path / "labels", HEADER)
    with pytest.raises(ValueError, match="0 crops were added, `header` says 21"):
        writer.finish()
    writer.close()
    assert not (tmp_path / "labels").exists()
