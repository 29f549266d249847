//! Which addresses are ours where the kernel forgets the mark (before Linux 5.18): written down, for this boot alone.

use std::{collections::BTreeSet, fs, net::IpAddr, path::Path, path::PathBuf};

/// Below the state directory: the boot, then an address and the index of its interface in each line.
const FILE: &str = "addresses";
/// Another in each boot; addresses do not outlive one.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// Addresses of ours without a mark, by interface.
#[derive(Debug)]
pub(super) struct Unmarked {
    file: PathBuf,
    boot: String,
    known: BTreeSet<(IpAddr, u32)>,
}

impl Unmarked {
    /// Reads what was written down since the box has booted.
    pub(super) fn load(state: &Path) -> Self {
        Self::of_boot(state, &boot())
    }

    fn of_boot(state: &Path, boot: &str) -> Self {
        let file = state.join(FILE);
        let text = fs::read_to_string(&file).unwrap_or_default();
        let mut lines = text.lines();
        let same = lines.next() == Some(boot);
        let entry = |line: &str| {
            let (address, index) = line.split_once(' ')?;
            Some((address.parse().ok()?, index.parse().ok()?))
        };
        Self {
            file,
            boot: boot.to_owned(),
            known: lines.filter(|_| same).filter_map(entry).collect(),
        }
    }

    /// Is it one of them?
    pub(super) fn holds(&self, address: IpAddr, index: u32) -> bool {
        self.known.contains(&(address, index))
    }

    /// From now on it is.
    pub(super) fn add(&mut self, address: IpAddr, index: u32) {
        if self.known.insert((address, index)) {
            self.write();
        }
    }

    /// It is none any more.
    pub(super) fn remove(&mut self, address: IpAddr, index: u32) {
        if self.known.remove(&(address, index)) {
            self.write();
        }
    }

    fn write(&self) {
        let lines = self.known.iter();
        let lines = lines.map(|(address, index)| format!("{address} {index}\n"));
        let text: String = [format!("{}\n", self.boot)]
            .into_iter()
            .chain(lines)
            .collect();
        // Replaced as a whole: what is half written would be forgotten.
        let aside = self.file.with_extension("new");
        let written = match self.known.is_empty() {
            true => fs::remove_file(&self.file),
            false => fs::write(&aside, text).and_then(|()| fs::rename(&aside, &self.file)),
        };
        if let Err(error) = written {
            log::warn!(
                "cannot write {}: {error}; this kernel marks no addresses, so those of a killed daemon will count as the \
                 admin's",
                self.file.display()
            );
        }
    }
}

/// Which boot of the box this is.
pub(super) fn boot() -> String {
    let boot = fs::read_to_string(BOOT).unwrap_or_default();
    boot.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_known_until_they_go_or_the_box_boots() {
        let folder = tempfile::tempdir().unwrap();
        let (four, six) = ("10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap());
        let mut first = Unmarked::of_boot(folder.path(), "one");
        first.add(four, 2);
        first.add(six, 3);
        first.remove(six, 2);
        let mut next = Unmarked::of_boot(folder.path(), "one");
        assert!(next.holds(four, 2) && next.holds(six, 3));
        assert!(!next.holds(four, 3), "on another interface it is another's");
        assert!(!Unmarked::of_boot(folder.path(), "two").holds(four, 2));
        next.remove(four, 2);
        assert!(!Unmarked::of_boot(folder.path(), "one").holds(four, 2));
        next.remove(six, 3);
        assert!(!folder.path().join(FILE).exists());
    }

    #[test]
    fn a_damaged_file_knows_nothing_more_than_it_says() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(
            folder.path().join(FILE),
            "one\n10.0.0.1\nx 2\n10.0.0.2 -1\n10.0.0.3 4",
        )
        .unwrap();
        let read = Unmarked::of_boot(folder.path(), "one");
        assert_eq!(read.known, [("10.0.0.3".parse().unwrap(), 4)].into());
    }
}
