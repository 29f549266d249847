//! `cargo xtask install` and `uninstall`: one binary, one configuration, two units; and the way back to nothing.

mod layout;
mod placeholder;
mod system;

use std::{
    fs,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use self::layout::{Layout, UNITS};
use crate::{
    build,
    command::{self, say},
    setup::{self, Need},
};

/// `cargo xtask install`
#[derive(Debug, clap::Args)]
pub(crate) struct InstallArgs {
    /// The configuration to install; one that is there already is never overwritten
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Install a configuration for the kernel plane alone: no proxy, no keys
    #[arg(long, conflicts_with = "config")]
    passthrough_only: bool,
    /// Install below this directory instead of `/`
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
}

/// `cargo xtask uninstall`
#[derive(Debug, clap::Args)]
pub(crate) struct UninstallArgs {
    /// Keep the configuration
    #[arg(long)]
    keep_config: bool,
    /// Remove the configuration directory with everything that was added to it, keys included
    #[arg(long, conflicts_with = "keep_config")]
    purge: bool,
    /// Uninstall below this directory instead of `/`
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
}

/// `cargo xtask install`
///
/// # Errors
/// When the build fails, the configuration is not valid, or a file cannot be written. Nothing is installed unless the
/// configuration is valid.
pub(crate) fn install(args: &InstallArgs) -> Result<()> {
    let layout = Layout::new(&args.root)?;
    layout.check_writable()?;
    let tools = setup::ensure(Need::Build)?;
    let binary = build::daemon(&tools, true)?;

    let staging = tempfile::tempdir().context("cannot make a temporary directory")?;
    let present = layout.config();
    let source = if present.exists() {
        say("install", format!("keeping {}", present.display()));
        present.clone()
    } else {
        wanted_config(args)
    };
    let placeholder = needs_placeholder(args, &layout);
    if placeholder {
        placeholder::make(staging.path())?;
    }
    let folder = if placeholder {
        staging.path().to_owned()
    } else {
        layout.config_folder()
    };
    check(&binary, &source, &folder, staging.path())?;

    put(&binary, &layout.binary(), 0o755)?;
    if source != present {
        put(&source, &present, 0o640)?;
    }
    if placeholder {
        for name in placeholder::FILES {
            put(
                &staging.path().join(name),
                &layout.config_folder().join(name),
                0o600,
            )?;
        }
    }
    for unit in UNITS {
        put(
            &command::repository().join("deploy").join(unit),
            &layout.unit(unit),
            0o644,
        )?;
    }
    if layout.is_live() {
        system::reload()?;
    }
    next_steps(&layout);
    Ok(())
}

fn wanted_config(args: &InstallArgs) -> PathBuf {
    let name = if args.passthrough_only {
        "passthrough-only.toml"
    } else {
        "smtplb.toml"
    };
    args.config
        .clone()
        .unwrap_or_else(|| command::repository().join("deploy").join(name))
}

/// The shipped configuration for both planes names a certificate that nobody has yet.
fn needs_placeholder(args: &InstallArgs, layout: &Layout) -> bool {
    let shipped = args.config.is_none() && !args.passthrough_only && !layout.config().exists();
    shipped
        && placeholder::FILES
            .iter()
            .all(|name| !layout.config_folder().join(name).exists())
}

/// Checks a configuration as if what it names below `/etc/smtplb` were in `folder`.
fn check(binary: &Path, config: &Path, folder: &Path, staging: &Path) -> Result<()> {
    let usual = Path::new("/etc/smtplb");
    let mut checked = config.to_owned();
    if folder != usual {
        let text = fs::read_to_string(config)
            .with_context(|| format!("cannot read {}", config.display()))?;
        checked = staging.join("smtplb.toml");
        fs::write(
            &checked,
            text.replace("\"/etc/smtplb/", &format!("\"{}/", folder.display())),
        )?;
    }
    command::run(Command::new(binary).arg("check").arg(&checked))
        .with_context(|| format!("{} is not valid, nothing was installed", config.display()))
}

/// Copies under a name of its own and renames: a running binary is replaced, never overwritten.
fn put(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let folder = to.parent().unwrap_or(Path::new("/"));
    // Only ever /etc/smtplb is new here, and it will hold keys.
    let folder_mode = if folder.ends_with("smtplb") {
        0o750
    } else {
        0o755
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(folder_mode)
        .create(folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    let mut new = to.as_os_str().to_owned();
    new.push(".new");
    fs::copy(from, &new)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
    fs::rename(&new, to).with_context(|| format!("cannot put {} in place", to.display()))?;
    say("install", to.display().to_string());
    Ok(())
}

fn next_steps(layout: &Layout) {
    let config = layout.config();
    say(
        "install",
        format!(
            "done. Next:\n  edit {config}            addresses, interfaces, members\n  smtplb check {config}\n  systemctl enable --now smtplb\n  smtplb status",
            config = config.display()
        ),
    );
}

/// `cargo xtask uninstall`
///
/// # Errors
/// When something cannot be stopped or removed; what else there is to remove is removed all the same.
pub(crate) fn uninstall(args: &UninstallArgs) -> Result<()> {
    let layout = Layout::new(&args.root)?;
    layout.check_writable()?;
    let mut failed = Vec::new();
    let mut attempt = |outcome: Result<()>| {
        if let Err(error) = outcome {
            failed.push(format!("{error:#}"));
        }
    };
    if layout.is_live() {
        attempt(system::stop());
    }
    for unit in UNITS {
        attempt(remove(&layout.unit(unit)));
    }
    attempt(remove(&layout.binary()));
    if !args.keep_config {
        attempt(remove_config(&layout, args.purge));
    }
    attempt(system::unmount(&layout.bpffs()));
    attempt(remove(&layout.runtime()));
    attempt(remove(&layout.state()));
    if layout.is_live() {
        attempt(system::reload());
    }
    layout.remove_empty_folders();
    if !failed.is_empty() {
        bail!("not everything is gone:\n  {}", failed.join("\n  "));
    }
    say("uninstall", "done");
    Ok(())
}

/// Removes what `install` put there. Keys and certificates are the admin's: they go only with `--purge`.
fn remove_config(layout: &Layout, purge: bool) -> Result<()> {
    let folder = layout.config_folder();
    if purge {
        return remove(&folder);
    }
    remove(&layout.config())?;
    for path in placeholder::FILES.map(|name| folder.join(name)) {
        if placeholder::is_one(&path) {
            remove(&path)?;
        }
    }
    let Ok(entries) = fs::read_dir(&folder) else {
        return Ok(());
    };
    let rest: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path().display().to_string()))
        .collect();
    if rest.is_empty() {
        return remove(&folder);
    }
    say(
        "uninstall",
        format!(
            "left for you, `--purge` would remove them: {}",
            rest.join(" ")
        ),
    );
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    let Ok(meta) = path.symlink_metadata() else {
        return Ok(());
    };
    let outcome = if meta.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    outcome.with_context(|| format!("cannot remove {}", path.display()))?;
    say("uninstall", format!("removed {}", path.display()));
    Ok(())
}
