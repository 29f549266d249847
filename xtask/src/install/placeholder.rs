//! A certificate for the time until the admin puts the real one in its place.
//!
//! The configuration that is installed names one, and a service that does not start before a certificate is bought is
//! hard to try.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, bail};

use crate::command::{self, say};

/// The files that the shipped configuration names.
pub(super) const FILES: [&str; 2] = ["mail.pem", "mail.key"];
/// First line of both files; what stands before a PEM block is skipped by who reads it (RFC 7468 §2).
const MARK: &str = "# Placeholder made by `cargo xtask install`: put your own in its place.\n";

/// Makes a self-signed certificate and its key.
///
/// # Errors
/// When there is no openssl.
pub(super) fn make(folder: &Path) -> Result<()> {
    if command::find("openssl").is_none() {
        bail!(
            "no openssl to make a placeholder certificate with: install it, or name a configuration by --config"
        );
    }
    say(
        "install",
        "making a self-signed certificate as a placeholder for yours",
    );
    let [chain, key] = FILES.map(|name| folder.join(name));
    command::read(
        Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
            ])
            .args([
                "-nodes",
                "-days",
                "30",
                "-subj",
                "/CN=smtplb placeholder",
                "-keyout",
            ])
            .arg(&key)
            .arg("-out")
            .arg(&chain),
    )?;
    for path in [chain, key] {
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        fs::write(&path, format!("{MARK}{text}"))?;
    }
    Ok(())
}

/// Whether a file is one that [`make`] made, and so nobody's loss.
pub(super) fn is_one(path: &Path) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text.starts_with(MARK))
}
