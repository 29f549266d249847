//! Files on disk: the ones we ship, and the ones that cannot be used.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::config::{LoadError, MAX_FILE, load};

fn shipped() -> Vec<PathBuf> {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let mut files: Vec<_> = [deploy.clone(), deploy.join("examples")]
        .iter()
        .flat_map(|directory| fs::read_dir(directory).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "toml")
        })
        .collect();
    files.sort();
    files
}

#[test]
fn every_shipped_configuration_is_accepted_without_a_warning() {
    let files = shipped();
    assert!(files.len() >= 7, "{files:?}");
    for file in files {
        match load(&file) {
            Ok((generation, warnings)) => {
                assert_eq!(warnings, [], "{}", file.display());
                assert!(!generation.virtual_servers.is_empty(), "{}", file.display());
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_file_that_cannot_be_used_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("smtplb.toml");
    let shown = path.display();

    let missing = load(&path).unwrap_err().to_string();
    assert_eq!(
        missing,
        format!(
            "{shown}: cannot be read: No such file or directory (os error 2)\n  No configuration is loaded.\n  \
             Check the path; `smtplb init` writes a first configuration."
        )
    );
    let folder = load(directory.path()).unwrap_err().to_string();
    assert!(
        folder.ends_with("Name a file inside this directory."),
        "{folder}"
    );

    fs::write(&path, b"mode = \"mixed\"\n# caf\xe9\n").unwrap();
    let latin = load(&path).unwrap_err().to_string();
    assert_eq!(
        latin,
        format!(
            "{shown}:2: is not UTF-8 text\n  No configuration is loaded.\n  \
             Save the file as UTF-8, or name the right file."
        )
    );

    fs::write(&path, vec![b'#'; MAX_FILE + 1]).unwrap();
    let long = load(&path).unwrap_err().to_string();
    assert_eq!(
        long,
        format!(
            "{shown}: is longer than 1024 KiB\n  No configuration is loaded.\n  Name the right file."
        )
    );

    fs::write(&path, "mode = 1\nmood = 2\n").unwrap();
    let error = load(&path).unwrap_err();
    assert!(matches!(&error, LoadError::Invalid(faults) if faults.len() == 2));
    assert!(
        error
            .to_string()
            .starts_with(&format!("{shown}:1:8: error: ")),
        "{error}"
    );
}
