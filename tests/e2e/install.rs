//! Installing into a tree, and uninstalling from it.

use std::{
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};

const UNITS: [&str; 2] = ["smtplb.service", "run-smtplb-bpf.mount"];

#[test]
fn what_is_installed_is_sound_and_goes_again() -> Result<()> {
    for variant in [&[][..], &["--passthrough-only"]] {
        let tree = tempfile::tempdir()?;
        xtask(tree.path(), &[&["install"][..], variant].concat())?;
        let installed = |path: &str| tree.path().join(path);

        let config = installed("etc/smtplb/smtplb.toml");
        check(tree.path(), &config).with_context(|| format!("{variant:?}"))?;
        check_units(tree.path())?;

        // What the admin wrote is never overwritten.
        let mut own = std::fs::read_to_string(&config)?;
        own.push_str("\n# mine\n");
        std::fs::write(&config, &own)?;
        xtask(tree.path(), &["install"])?;
        ensure!(
            std::fs::read_to_string(&config)? == own,
            "the configuration was overwritten"
        );

        xtask(tree.path(), &["uninstall"])?;
        let left: Vec<_> = std::fs::read_dir(tree.path())?.collect();
        ensure!(left.is_empty(), "{left:?}");
    }
    Ok(())
}

#[test]
fn an_invalid_configuration_is_not_installed() -> Result<()> {
    let tree = tempfile::tempdir()?;
    let config = tempfile::NamedTempFile::new()?;
    std::fs::write(config.path(), "mode = \"miksed\"\n")?;
    let name = config.path().to_string_lossy().into_owned();
    let error = xtask(tree.path(), &["install", "--config", &name])
        .err()
        .context("it was installed")?;
    ensure!(error.to_string().contains("not valid"), "{error}");
    let left: Vec<_> = std::fs::read_dir(tree.path())?.collect();
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// The installed program accepts the installed configuration; only the tree is not where it will be.
fn check(tree: &Path, config: &Path) -> Result<()> {
    let written = std::fs::read_to_string(config)?;
    let moved = tempfile::NamedTempFile::new()?;
    let here = format!("\"{}/etc/smtplb/", tree.display());
    std::fs::write(moved.path(), written.replace("\"/etc/smtplb/", &here))?;
    let smtplb = tree.join("usr/local/sbin/smtplb");
    let output = Command::new(smtplb)
        .arg("check")
        .arg(moved.path())
        .output()?;
    ensure!(output.status.success(), "{}", text(&output));
    Ok(())
}

/// What systemd says of the units, where it is at hand.
fn check_units(tree: &Path) -> Result<()> {
    // It wants to see the program, which is not yet where it will be.
    let moved = tempfile::tempdir()?;
    let mut units = Vec::new();
    for name in UNITS {
        let text =
            std::fs::read_to_string(tree.join("etc/systemd/system").join(name)).context(name)?;
        let text = ["ExecStart=", "ExecReload="]
            .iter()
            .fold(text, |text, key| {
                text.replace(&format!("{key}/"), &format!("{key}{}/", tree.display()))
            });
        let unit = moved.path().join(name);
        std::fs::write(&unit, text)?;
        units.push(unit);
    }
    let Ok(output) = Command::new("systemd-analyze")
        .arg("verify")
        .args(&units)
        .output()
    else {
        eprintln!("no systemd-analyze here: the units are not verified");
        return Ok(());
    };
    ensure!(
        output.status.success() && text(&output).is_empty(),
        "{}",
        text(&output)
    );

    let mut security = Command::new("systemd-analyze");
    security
        .args(["security", "--offline=true", "--threshold=30"])
        .arg(&units[0]);
    let output = security.output()?;
    ensure!(
        output.status.success(),
        "exposed more than 3.0: {}",
        text(&output)
    );
    Ok(())
}

fn xtask(tree: &Path, arguments: &[&str]) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["run", "--quiet", "--package", "xtask", "--"])
        .args(arguments)
        .arg("--root")
        .arg(tree)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .output()?;
    ensure!(output.status.success(), "{arguments:?}: {}", text(&output));
    Ok(())
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
