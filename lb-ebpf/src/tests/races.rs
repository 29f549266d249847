//! What two processors do at once, one step after the other.

use super::*;

#[test]
fn a_record_that_is_taken_apart_is_nobody_elses() {
    let tables = MemoryTables::one_address(Service::SNAT_AUTOMAP);
    open(&tables, 1000).unwrap();
    let slot = tables.live()[0];
    let flow = tables.flow(slot).unwrap();
    let resting = || {
        let chunk = &tables.chunks[(slot / CHUNK) as usize];
        chunk.resting.load(Relaxed) >> (slot % CHUNK) & 1 != 0
    };
    let pick = || tables.pick(1, Mark::Resting) as u32;
    tables.send(&mut packet(1000, RST)).unwrap();
    assert!(resting());
    // One takes it apart to forget it; another looks for a resting port meanwhile.
    assert!(tables.release(slot, tables.phase(slot), Cause::Reused));
    assert_ne!(pick(), slot);
    assert!(!resting());
    flow.phase.store(Phase::Free as u32, Relaxed);
    tables.put_port(slot, Mark::Resting);
    // Given back, and its mark not yet taken off.
    assert_ne!(pick(), slot);
    assert_eq!(tables.phase(slot), Phase::Free, "not taken");
    flow.phase.store(Phase::Reset as u32, Relaxed);
    assert!(tables.forget(slot));
    assert!(resting(), "rests on");
    assert_eq!(tables.phase(slot), Phase::Forgotten);
    assert_eq!(pick(), slot);
    assert_eq!(tables.phase(slot), Phase::Claimed);
}
