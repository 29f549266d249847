//! A machine with another kernel: emulated, on this machine's own files read-only, for one job.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use super::packages::{self, Kernel};
use crate::command;

/// What the guest needs before it sees its files.
const EARLY_MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];
/// Between two looks at what the guest says.
const LOOK: Duration = Duration::from_millis(200);

/// Boots a kernel, runs a shell script as root and passes on what it says, line by line; returns its exit code.
///
/// # Errors
/// When the guest does not start, or does not end within `limit`; quotes its console.
pub(super) fn run(
    kernel: &Kernel,
    job: &str,
    limit: Duration,
    mut line: impl FnMut(&str),
) -> Result<i32> {
    // Other users cannot look into it.
    let folder = tempfile::Builder::new()
        .prefix("smtplb-kernel-")
        .tempdir()?;
    let folder = folder.path();
    let shared = folder.join("shared");
    fs::create_dir_all(&shared)?;
    fs::write(shared.join("job"), job)?;
    fs::write(shared.join("start"), include_str!("start.sh"))?;
    let initial = initial_files(kernel, folder)?;
    let console = folder.join("console");
    let mut qemu = machine(kernel, &initial, &shared, &console)?;
    let mut child = qemu
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start `{}`", command::line(&qemu)))?;

    let output = shared.join("output");
    let (mut said, mut rest) = (0, Vec::new());
    let mut pass_on = |last: bool| -> Result<()> {
        rest.extend(read_from(&output, &mut said)?);
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let whole: Vec<u8> = rest.drain(..=end).collect();
            line(String::from_utf8_lossy(&whole).trim_end());
        }
        if last && !rest.is_empty() {
            line(&String::from_utf8_lossy(&rest));
        }
        Ok(())
    };
    let deadline = Instant::now() + limit;
    let ended = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            break None;
        }
        pass_on(false)?;
        thread::park_timeout(LOOK);
    };
    pass_on(true)?;
    let code = fs::read_to_string(shared.join("code")).ok();
    let console = String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()).into_owned();
    match (ended, code.and_then(|code| code.trim().parse().ok())) {
        (Some(_), Some(code)) => Ok(code),
        (Some(status), None) => bail!(
            "{} ended with {status} before its job did:\n{}",
            kernel.release,
            end_of(&console)
        ),
        (None, _) => bail!(
            "{} did not end within {} s:\n{}",
            kernel.release,
            limit.as_secs(),
            end_of(&console)
        ),
    }
}

/// An archive with a shell, the early modules and the first program.
fn initial_files(kernel: &Kernel, folder: &Path) -> Result<std::path::PathBuf> {
    let root = folder.join("initial");
    for part in [
        "bin", "modules", "proc", "sys", "dev", "lower", "layer", "root",
    ] {
        fs::create_dir_all(root.join(part))?;
    }
    let busybox = fs::read(packages::program("busybox")?)?;
    ensure!(
        !busybox.windows(9).any(|window| window == b"/ld-linux"),
        "busybox needs libraries that the guest has not yet: install busybox-static"
    );
    write_program(&root.join("bin/busybox"), &busybox)?;
    write_program(&root.join("init"), include_bytes!("init.sh"))?;
    let mut order = String::new();
    for module in EARLY_MODULES {
        for file in kernel.module(module)? {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let plain = name.trim_end_matches(".xz");
            let to = root.join("modules").join(plain);
            if to.exists() {
                continue;
            }
            if plain == name {
                fs::copy(&file, &to)?;
            } else {
                let mut xz = Command::new(packages::program("xz")?);
                xz.arg("-dc").arg(&file).stdout(File::create(&to)?);
                command::run(&mut xz)?;
            }
            order.push_str(plain);
            order.push('\n');
        }
    }
    fs::write(root.join("modules/order"), order)?;

    let archive = folder.join("initial.cpio");
    let mut cpio = Command::new(packages::program("cpio")?);
    cpio.current_dir(&root)
        .args(["--create", "--format=newc", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(File::create(&archive)?);
    let mut child = cpio.spawn().context("cannot start cpio")?;
    let names = names_below(&root, Path::new("."))?;
    child
        .stdin
        .take()
        .context("no stdin")?
        .write_all(names.as_bytes())?;
    ensure!(child.wait()?.success(), "cpio failed");
    Ok(archive)
}

fn write_program(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Every name below a folder, folders before what is in them.
fn names_below(root: &Path, folder: &Path) -> Result<String> {
    let mut names = String::new();
    for entry in fs::read_dir(root.join(folder))? {
        let entry = entry?;
        let name = folder.join(entry.file_name());
        names.push_str(&format!("{}\n", name.display()));
        if entry.file_type()?.is_dir() {
            names.push_str(&names_below(root, &name)?);
        }
    }
    Ok(names)
}

/// Emulated in software: hardware help is not to be had everywhere, and the same everywhere is worth more.
fn machine(kernel: &Kernel, initial: &Path, shared: &Path, console: &Path) -> Result<Command> {
    let mut qemu = Command::new(packages::program("qemu-system-x86_64")?);
    qemu.args(["-accel", "tcg,thread=multi", "-smp", "2", "-m", "3G"])
        // Five-level page tables cost an emulator dearly.
        .args(["-cpu", "max,la57=off"])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .arg("-kernel")
        .arg(kernel.image())
        .arg("-initrd")
        .arg(initial)
        .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"]);
    for (tag, path, more) in [
        ("host", Path::new("/"), ",readonly=on,multidevs=remap"),
        ("modules", &kernel.modules(), ",readonly=on"),
        ("guest", shared, ""),
    ] {
        qemu.arg("-virtfs").arg(format!(
            "local,path={},mount_tag={tag},security_model=none{more}",
            path.display()
        ));
    }
    Ok(qemu)
}

/// What a file has gained since the last look.
fn read_from(path: &Path, seen: &mut u64) -> Result<Vec<u8>> {
    use std::io::{Seek as _, SeekFrom};
    let Ok(mut file) = File::open(path) else {
        return Ok(Vec::new());
    };
    file.seek(SeekFrom::Start(*seen))?;
    let mut more = Vec::new();
    file.read_to_end(&mut more)?;
    *seen += more.len() as u64;
    Ok(more)
}

fn end_of(console: &str) -> String {
    let lines: Vec<&str> = console.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}
