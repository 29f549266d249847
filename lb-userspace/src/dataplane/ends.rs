//! The ends of flows, taken out of the programs' ring buffer.

use anyhow::{Context, Result};
use aya::maps::{Map, MapData, RingBuf};
use lb_common::event::FlowEnd;

use super::{bpffs::PinDirectory, sys};

/// The reader of the ring buffer. What an earlier reader left in it comes first.
pub struct FlowEnds(RingBuf<MapData>);

impl FlowEnds {
    pub(super) fn open(pins: &PinDirectory) -> Result<Self> {
        let data = MapData::from_pin(pins.pin("FLOW_ENDS")).context("no ring buffer is pinned")?;
        let ring = RingBuf::try_from(Map::RingBuf(data))?;
        Ok(Self(ring))
    }

    /// Takes the next one out.
    pub fn take(&mut self) -> Option<FlowEnd> {
        loop {
            let item = self.0.next()?;
            // A record of another size cannot be from this layout; it is passed over.
            if let Some(end) = sys::flow_end(&item) {
                return Some(end);
            }
        }
    }
}
