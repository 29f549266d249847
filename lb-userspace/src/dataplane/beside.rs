//! Flows of another layout, left by an older smtplb: its programs run behind ours and carry them to their end.
//!
//! A packet that belongs to none of our flows goes on to the next program of the TC hook, which knows the old ones. New
//! connections are ours, since our programs come first.

use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use lb_common::{layout::MAX_VIRTUAL_SERVERS, stats::TrafficCell};

use super::bpffs::{PinDirectory, clear_directory};

/// Flows that nobody sweeps would count for ever: what lives longer than this is cut.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
const WORDS: usize = size_of::<TrafficCell>() / 8;

/// Looks whether other layouts still carry something.
#[derive(Debug)]
pub(super) struct Beside {
    since: Instant,
    told: bool,
}

impl Beside {
    /// From now on.
    pub(super) fn new() -> Self {
        Self {
            since: Instant::now(),
            told: false,
        }
    }

    /// Removes the layouts that carry nothing any more.
    pub(super) fn tend(&mut self, pins: &PinDirectory) {
        for path in pins.others() {
            let active = MapData::from_pin(path.join("SERVICE_CELLS"))
                .ok()
                .map_or(0, active);
            if active > 0 && self.since.elapsed() < LONGEST {
                if !self.told {
                    log::info!(
                        "{active} flows of another version go on in {} until they end",
                        path.display()
                    );
                    self.told = true;
                }
                continue;
            }
            match clear_directory(&path) {
                Ok(()) => log::info!("{} carries nothing any more and is removed", path.display()),
                Err(error) => log::error!("cannot remove {}: {error}", path.display()),
            }
        }
    }
}

/// The flows of all virtual servers: the first word of each cell. Cells of another size tell nothing.
fn active(data: MapData) -> u64 {
    let Ok(cells) = Array::<_, [u64; WORDS]>::try_from(Map::Array(data)) else {
        return 0;
    };
    (1..MAX_VIRTUAL_SERVERS)
        .filter_map(|number| cells.get(&number, 0).ok())
        .map(|cell| cell[0])
        .sum()
}
