use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::conformance::model;

/// A store whose watchers fall back to the log almost always.
fn forgetful() -> Options {
    Options { recent_revisions: 2, ..Options::default() }
}

mod conformance {
    use super::*;
    crate::conformance_tests!(Arc::new(SqliteStore::open_temporary().unwrap()));
}

mod conformance_from_the_log {
    use super::*;
    crate::conformance_tests!(Arc::new(SqliteStore::open_temporary_with(forgetful()).unwrap()));
}

fn check_model(options: Options, steps: Vec<model::Step>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.db");
    let open = || -> Arc<dyn Store> { Arc::new(SqliteStore::open_with(&path, options.clone()).unwrap()) };
    runtime.block_on(model::check(open(), steps, async |store| {
        drop(store);
        open()
    }));
}

proptest! {
    #[test]
    fn random_histories_match_the_model(steps in model::histories(60)) {
        check_model(Options::default(), steps);
    }

    #[test]
    fn random_histories_match_the_model_from_the_log(steps in model::histories(60)) {
        check_model(forgetful(), steps);
    }
}
