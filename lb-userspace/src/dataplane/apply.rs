//! A generation comes into use: built beside the one before, then flipped to.

use anyhow::{Context as _, Result};
use lb_common::{index::HASH_KEYS, service::Config, tcp};

use super::{
    KernelPlane,
    policies::FilledPolicies,
    tables::{self, Numbers},
};
use crate::model::Generation;

/// A generation in the kernel's tables that is not in use yet.
pub struct Built {
    tables: tables::Built,
    policies: FilledPolicies,
}

impl KernelPlane {
    /// Builds a generation and flips the tables to it.
    ///
    /// # Errors
    ///
    /// When a table refuses a record; the generation in use stays in use.
    pub fn apply(
        &mut self,
        generation: &Generation,
        numbers: &Numbers,
        up: impl Fn(u16) -> bool,
        workers: u32,
    ) -> Result<()> {
        let built = self.build(generation, numbers, workers)?;
        self.flip(generation, numbers, up, built)
    }

    /// Builds a generation beside the one in use. What does not fit is found here.
    ///
    /// # Errors
    ///
    /// When a table has no room, or refuses a record; the generation in use stays in use.
    pub fn build(
        &mut self,
        generation: &Generation,
        numbers: &Numbers,
        workers: u32,
    ) -> Result<Built> {
        let timeouts = &generation.timeouts;
        let config = Config {
            epoch: 0,
            generation: 0,
            chunks: 0,
            flow_mask: 0,
            embryonic: 0,
            by_key: 0,
            limits: [
                timeouts.syn,
                timeouts.established,
                timeouts.half_closed,
                timeouts.closing,
            ]
            .map(|limit| tcp::ticks(limit.as_millis() as u64)),
            workers,
            owner: std::process::id(),
            instance: self.instance,
            prefixes: 0,
            seeds: [0; 2],
            hash: [0; HASH_KEYS],
            cookie: [0; 2],
            filter: [0; 8],
        };
        let policies = self
            .policies
            .fill(generation, numbers, self.tables.next_epoch())
            .context("cannot fill the policies of the kernel plane")?;
        let tables = self
            .tables
            .build(generation, numbers, config)
            .context("cannot fill the tables of the kernel plane")?;
        Ok(Built { tables, policies })
    }

    /// Flips to the generation that [`Self::build`] has made of the same `generation` and `numbers`; `up` says of a
    /// member's number whether it may have new connections.
    ///
    /// # Errors
    ///
    /// When a table refuses a record.
    pub fn flip(
        &mut self,
        generation: &Generation,
        numbers: &Numbers,
        up: impl Fn(u16) -> bool,
        built: Built,
    ) -> Result<()> {
        self.tables
            .flip(generation, numbers, up, built.tables)
            .context("cannot fill the tables of the kernel plane")?;
        self.policies.flipped(built.policies);
        Ok(())
    }
}
