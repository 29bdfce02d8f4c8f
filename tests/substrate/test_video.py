"""Moving shapes: what a video shows is what its text says, and it depends on nothing but its number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.data import batches, video
from jaxrepro.models import video_dit

SIZES = st.tuples(st.integers(2, 9), st.integers(12, 20), st.integers(12, 20))


@given(st.integers(0, 10**6), st.sampled_from(video.SPLITS), SIZES)
@settings(max_examples=40, deadline=None)
def test_a_clean_video_is_recognised(start, split, size):
    videos = video.moving_shapes(1, split=split, start=start, size=size)
    assert videos.latents.shape == (1, 4, *size)
    np.testing.assert_array_equal(video.recognise(videos.latents), videos.ids)


def test_all_words_occur_and_are_recognised_under_noise():
    videos = video.moving_shapes(200)
    noise = np.random.default_rng(0).normal(size=videos.latents.shape)
    seen = video.recognise(videos.latents + 0.4 * noise)
    assert (seen == videos.ids).mean(0).min() > 0.97
    assert set(videos.ids.ravel()) == set(range(len(video.VOCABULARY)))


def test_latents_have_about_mean_zero_and_variance_one():
    x = video.moving_shapes(300, split="test").latents
    assert abs(x.mean((0, 2, 3, 4))).max() < 0.08
    assert abs(x.std((0, 2, 3, 4)) - 1).max() < 0.08


def test_a_shape_moves_by_its_velocity_and_comes_back_on_the_other_side():
    # 16 cells: a fast shape to the right is where it was after 8 frames
    right, fast = video.VOCABULARY.index("right"), video.VOCABULARY.index("fast")
    i = next(i for i in range(1000) if list(video.example("train", i)["ids"][2:]) == [right, fast])
    x = video.example("train", i, size=(9, 16, 16))["latents"]
    np.testing.assert_allclose(x[:, 8], x[:, 0], atol=1e-5)
    cover = x[3]
    np.testing.assert_allclose(cover[1], np.roll(cover[0], 2, axis=-1), atol=1e-5)
    np.testing.assert_allclose(video.velocity(3, 1), [np.sqrt(0.5), -np.sqrt(0.5)])  # down-left


def test_pictures_are_the_rendered_colours_to_half_a_grey_level():
    x = video.moving_shapes(3).latents
    rgb = np.moveaxis(x, 1, -1)[..., :3] * video.STD[:3] + video.MEAN[:3]
    pictures = video.to_pictures(x)
    assert pictures.shape == (3, 8, 16, 16, 3)
    assert abs(pictures / 255 - rgb).max() <= 0.5 / 255 + 1e-6
    assert video.to_pictures(x[0] * 1e6).max() == 255  # cut, not wrapped


def test_a_video_depends_on_its_split_number_and_seed_alone():
    both = video.moving_shapes(4, start=2)
    alone = video.moving_shapes(1, start=4)
    np.testing.assert_array_equal(both.latents[2:3], alone.latents)
    others = [{"split": "test"}, {"seed": 1}, {"start": 5}]
    for other in others:
        assert (video.moving_shapes(1, **{"start": 4} | other).latents != alone.latents).any()


def test_batches_are_random_access_and_feed_a_video_transformer():
    source = batches.Generated(lambda i: video.example("train", i, size=(2, 8, 8)))
    data = batches.dataset(source, video.arrays, batch=2)
    batch = data[3].arrays
    np.testing.assert_array_equal(batch["ids"], video.moving_shapes(2, start=6, size=(2, 8, 8)).ids)
    cfg = video_dit.WanConfig(
        heads=1, head_dim=8, layers=1, ffn=8, channels=4, out_channels=4, text=21, frequencies=8
    )
    abstract = jax.eval_shape(
        lambda p, x, text: video_dit.apply(p, cfg, x, jnp.ones(2), video_dit.Condition(text)),
        video_dit.abstract(cfg),
        jnp.asarray(batch["latents"]),
        jnp.asarray(batch["text"]),
    )
    assert abstract.shape == batch["latents"].shape


def test_text_states_are_one_hot_rows_and_captions_are_words():
    ids = video.moving_shapes(1).ids
    states = video.states(ids, width=30)
    assert states.shape == (1, 4, 30) and (states.sum(-1) == 1).all()
    np.testing.assert_array_equal(states.argmax(-1), ids)
    assert set(video.caption(ids[0]).split()) == {video.VOCABULARY[i] for i in ids[0]}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: video.moving_shapes(0), "n is 0"),
        (lambda: video.moving_shapes(1, split="valid"), "train, test"),
        (lambda: video.moving_shapes(1, start=-1), "index is -1"),
        (lambda: video.moving_shapes(1, size=(8, 4, 16)), "size (8, 4, 16)"),
        (lambda: video.states(np.zeros((1, 4), int), 20), "width 20"),
        (lambda: video.to_pictures(np.zeros((3, 1, 8, 8), np.float32)), "3 channels"),
        (lambda: video.recognise(np.zeros((1, 4, 1, 8, 8), np.float32)), "two"),
    ],
)
def test_what_cannot_be_drawn_or_read_is_one_line(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
