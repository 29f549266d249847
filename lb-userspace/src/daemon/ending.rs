//! What the operator wants of members, and the end of their connections.

use std::{sync::Arc, time::Duration};

use lb_common::event::Cause;

use super::{Daemon, lock, roster, running::Running};
use crate::{
    admin::Refusal,
    model::{Name, OnDown},
    pool::{Admin, LiveMember},
    proxy::Control,
};

impl Daemon {
    /// Sets what the operator wants of a member; `deadline`: until its connections are ended.
    pub(super) async fn set_admin(
        &mut self,
        pool: &str,
        member: &str,
        admin: Admin,
        deadline: Option<Duration>,
    ) -> Result<(), Refusal> {
        let running = self.shared.running();
        let Some(live) = running.member(pool, member).cloned() else {
            let known: Vec<_> = running
                .members()
                .map(|(pool, member)| format!("{pool}/{}", member.name))
                .collect();
            return Err(Refusal::unknown(format!(
                "no member is named \"{pool}/{member}\"\n  The daemon knows: {}.",
                known.join(", ")
            )));
        };
        lock(&self.shared.roster)
            .set(pool, member, admin, deadline)
            .map_err(|error| {
                Refusal::failed(format!(
                    "cannot write the state of {pool}/{member} into --state {}: {error}\n  \
                     It would be lost with the daemon, so nothing was changed.",
                    self.options.state.display()
                ))
            })?;
        live.set_admin(admin);
        if let Some((name, _)) = running.pools.get_key_value(pool) {
            let mut plane = self.shared.plane();
            self.shared.write_member(&mut plane, name, &live);
        }
        self.watch_again(&running, live.id);
        let until = match (admin, deadline) {
            (Admin::Ready, _) => String::new(),
            (_, Some(limit)) => format!(", its connections end in {} s", limit.as_secs_f32()),
            (Admin::Drain, None) => ", its connections go on".to_owned(),
            (Admin::Maint, None) => ", its connections end".to_owned(),
        };
        log::info!("member {pool}/{member} is set to {}{until}", admin.word());
        self.end_due().await;
        Ok(())
    }

    /// Watches those that are not in maintenance; of this member nothing is known any more.
    fn watch_again(&mut self, running: &Running, changed: u16) {
        let health = lock(&self.shared.health);
        let known = |number: u16| number != changed && health.contains_key(&number);
        let targets = super::live::targets(&running.generation, &running.pools, known);
        drop(health);
        self.watches.set(targets);
    }

    /// Ends the connections of members whose time is over.
    pub(super) async fn end_due(&mut self) {
        let due = lock(&self.shared.roster).due();
        if due.is_empty() {
            return;
        }
        let running = self.shared.running();
        let patience = running.generation.session.drain;
        for (pool, member, entry) in due {
            let Some(live) = running.member(&pool, &member) else {
                continue;
            };
            let reason = match entry.admin {
                Admin::Maint => Cause::Maintenance,
                Admin::Drain | Admin::Ready => Cause::Drained,
            };
            if entry.ended {
                // One that was being opened while the others were ended.
                if live.counters().flows() > 0 {
                    self.end_flows(live, reason).await;
                }
                if !entry.cut && entry.is_over_for(patience) {
                    self.cut_sessions(&pool, live);
                }
                continue;
            }
            let control = match entry.admin {
                Admin::Maint => Control::Cut,
                Admin::Drain | Admin::Ready => Control::Drain,
            };
            self.end_member(&pool, live, reason, control).await;
            lock(&self.shared.roster).note_ended(&pool, &member);
        }
    }

    /// What is still within a message has had its time.
    fn cut_sessions(&self, pool: &str, member: &LiveMember) {
        lock(&self.shared.roster).note_cut(pool, &member.name);
        let sessions = member.counters().sessions();
        if sessions == 0 {
            return;
        }
        if let Some(proxy) = lock(&self.shared.proxy).as_ref() {
            proxy.end_member(member.id, Control::Cut);
        }
        log::info!(
            "member {pool}/{}: {sessions} sessions were cut within a message",
            member.name
        );
    }

    /// A monitor has found a member down: its connections end, if its pool wants that.
    pub(super) async fn member_fell(&mut self, pool: &Name, member: &Arc<LiveMember>) {
        let running = self.shared.running();
        let wanted = running.generation.pools.get(pool);
        if wanted.is_some_and(|pool| pool.on_down == OnDown::Reset) && !member.is_up() {
            self.end_member(pool, member, Cause::MemberDown, Control::Cut)
                .await;
        }
    }

    async fn end_member(
        &mut self,
        pool: &str,
        member: &LiveMember,
        reason: Cause,
        control: Control,
    ) {
        let sessions = member.counters().sessions();
        if let Some(proxy) = lock(&self.shared.proxy).as_ref() {
            proxy.end_member(member.id, control);
        }
        let flows = self.end_flows(member, reason).await;
        log::info!(
            "member {pool}/{}: {flows} flows were reset and {sessions} sessions told to end ({})",
            member.name,
            word(reason)
        );
    }

    /// Resets a member's flows; how many.
    async fn end_flows(&mut self, member: &LiveMember, reason: Cause) -> usize {
        let shared = self.shared.clone();
        let number = member.id;
        // A table may have millions of records; the monitors go on meanwhile.
        let ended = tokio::task::spawn_blocking(move || {
            let table = shared.plane().flow_table();
            let mut ended = 0;
            for batch in table.of_member(number) {
                ended += shared.plane().end_flows(number, &batch, reason)?;
            }
            Ok::<_, anyhow::Error>(ended)
        });
        match ended.await {
            Ok(Ok(ended)) => ended,
            Ok(Err(error)) => {
                log::error!("cannot reset flows: {error:#}");
                0
            }
            Err(error) => {
                log::error!("cannot reset flows: {error}");
                0
            }
        }
    }
}

/// Why, in the log of the daemon.
fn word(cause: Cause) -> &'static str {
    match cause {
        Cause::Drained => "its time to drain is over",
        Cause::Maintenance => "maintenance",
        _ => "it is down",
    }
}

/// Seconds from now until a deadline of the roster.
pub(super) fn seconds_until(moment: u64) -> u64 {
    moment.saturating_sub(roster::now_ms()).div_ceil(1000)
}
