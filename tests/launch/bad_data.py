"""Bad inputs about data."""

from bad_rows import Bad, train

DATA = [
    Bad(train("data.size=4"), "data.size must be 8 or more for digits"),
    Bad(train("data.size=0"), "size must be (above 0|1 or more)"),
    Bad(train("data.size=16384", "data.channels=3"), "GiB of memory"),
    Bad(train("data.channels=2"), "data.channels must be 1 or 3"),
    Bad(train("data.num_classes=5"), "data.num_classes is 5, but .* has 10 classes"),
    Bad(train("data.num_classes=-1"), "num_classes must be 0"),
    Bad(train("data.split=tests"), r"unknown data\.split of 'digits' 'tests' .*; choices: train, most, test"),
    Bad(
        train("run.heldout_every=50"), "data.split=train of 'digits' is all of its images.*data.split=most leaves every"
    ),
    Bad(train("evaluate.metrics=[heldout]"), "data.split=train of 'digits' is all of its images"),
    Bad(train("evaluate.split=test", "data.split=test"), "data.split=test is the test split itself"),
    Bad(train("evaluate.split=tset"), r"unknown evaluate.split 'tset' .*choices: train, test"),
    Bad(train("evaluate.metrics=[fd@tset]"), r"unknown evaluate.metrics fd@ 'tset' .*choices: train, test"),
    Bad(train("evaluate.metrics=[isc,isc@train]"), "evaluate.metrics isc@train: isc is of the samples alone"),
    Bad(train("evaluate.metrics=[heldout@train]"), "evaluate.metrics heldout@train: heldout is of the test split"),
    Bad(
        train("evaluate.metrics=[fd@test]", "evaluate.reference=x.npz"),
        "evaluate.metrics fd@test: fd is of the file evaluate.reference, so that it takes no @test",
    ),
    Bad(train("evaluate.metrics=[fd@test]"), "data.split=train of 'digits' is all of its images"),
    Bad(train("sample.curve_count=0"), "sample.curve_count must be above 0"),
    Bad(train("evaluate.heldout_count=0"), "evaluate.heldout_count must be above 0"),
    Bad(
        train("run.heldout_every=70"), "run.heldout_every must be 0 .none. or a multiple of run.log_every 50.*, not 70"
    ),
    Bad(train("data.kind=zip"), r"unknown data\.kind 'zip'"),
    Bad(train("data=npz", "data.channels=1"), "data.path is not set"),
    Bad(train("data=npz", "data.channels=1", "data.path=no.npz"), r"data\.path no\.npz does not exist"),
    Bad(train("data=npz", "data.channels=1", "data.path=plain.npz"), r"plain\.npz is not a readable \.npz"),
    Bad(train("data=npz", "data.channels=1", "data.path=cut.npz"), r"cut\.npz is not a readable \.npz"),
    Bad(train("data=npz", "data.channels=1", "data.path=huge.npz"), r"huge\.npz"),
    Bad(train("data=npz", "data.channels=1", "data.path=float.npz"), r"float\.npz: images is float32"),
    Bad(train("data=npz", "data.channels=1", "data.path=object.npz"), r"object\.npz"),
    Bad(train("data=npz", "data.channels=1", "data.path=bare.npz"), r"bare\.npz has no array 'images'"),
    Bad(train("data=npz", "data.channels=3", "data.path=few.npz"), "data.channels is 3, but the images"),
    Bad(train("data=npz", "data.channels=1", "data.path=empty"), "empty"),
    Bad(train("data=npz", "data.channels=1", "data.path={long}"), "File name too long"),
    Bad(train("data=folder", "data.channels=1"), "data.path is not set"),
    Bad(train("data=folder", "data.channels=1", "data.path=nowhere"), "data.path nowhere does not exist"),
    Bad(train("data=folder", "data.channels=1", "data.path=few.npz"), r"few\.npz is not a folder"),
    Bad(train("data=folder", "data.channels=1", "data.path=empty"), "empty contains no image"),
    Bad(train("data=folder", "data.channels=1", "data.path=images", "data.num_classes=1"), r"broken\.png"),
    Bad(train("data=folder", "data.channels=1", "data.path=two"), "data.num_classes is 1000, but .* has 2 classes"),
    Bad(train("data=webdataset", "data.channels=1"), "data.path is not set"),
    Bad(train("data=webdataset", "data.channels=1", "data.path=x-{0..3}.tar"), r"x-0\.tar, .*x-3\.tar do not exist"),
    Bad(train("data=webdataset", "data.channels=1", "data.path=two"), r"two contains no shard of WebDataset \(\.tar\)"),
    Bad(train("data=webdataset", "data.channels=1", "data.path=few.npz"), r"few\.npz is not a whole tar file"),
    Bad(train("data=hf", "data.channels=1"), "data.path is not set"),
    Bad(
        train("data=hf", "data.channels=1", "data.path=ylecun/mnist"),
        "ylecun/mnist does not exist; data 'hf' reads .*and downloads nothing",
    ),
    Bad(train("data=hf", "data.channels=1", "data.path=two"), "two is no data set of Hugging Face: expected"),
    Bad(train("data=cifar10", "data.channels=1"), "data.path is not set"),
    Bad(train("data=cifar10", "data.channels=1", "data.path=empty"), "(?i)cifar"),
]
