//! The event that counts retired conditional branches, by CPU model. A model that is not listed is refused: with an event
//! that is a little wrong, positions would be a little wrong.
//!
//! Sources: Intel's and AMD's event lists in Linux's `tools/perf/pmu-events`, and the experience of rr with each model.

use std::arch::x86_64::__cpuid;
use std::fmt;

/// A CPU model, as in CPUID leaf 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuModel {
    /// Vendor string.
    pub vendor: String,
    /// The family, including the extended family.
    pub family: u32,
    /// The model, including the extended model.
    pub model: u32,
}

impl CpuModel {
    /// The CPU on which this program runs.
    pub fn host() -> CpuModel {
        let vendor = __cpuid(0);
        let bytes = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        let eax = __cpuid(1).eax;
        let (family, model) = (eax >> 8 & 15, eax >> 4 & 15);
        // SDM 2A, CPUID: the extended model counts for some families only. AMD's rule gives the same for the families below.
        let extended = family == 15 || family == 6;
        CpuModel {
            vendor: String::from_utf8_lossy(bytes.as_flattened()).into_owned(),
            family: family + if family == 15 { eax >> 20 & 255 } else { 0 },
            model: model + if extended { eax >> 16 << 4 & 0xf0 } else { 0 },
        }
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} family {:#x} model {:#x}", self.vendor, self.family, self.model)
    }
}

/// The kinds of cores of a hybrid CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Core {
    /// Performance cores, and all cores of a CPU that is not hybrid.
    Big,
    /// Efficient cores.
    Small,
}

/// How to count conditional branches, and what is known about the counter before it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BranchEvent {
    /// Event select, unit mask and extensions, as `perf_event_attr.config` of the raw type.
    pub config: u64,
    /// How late an overflow is expected to be at most, in branches.
    pub skid: u64,
    /// Now and then an overflow may be later than any margin.
    pub unbounded: bool,
    /// The vendor's name for the event.
    pub name: &'static str,
}

const OLD_CORE: BranchEvent = intel(0x01c4, 100, "BR_INST_RETIRED.CONDITIONAL");
const ICE_LAKE: BranchEvent = intel(0x11c4, 100, "BR_INST_RETIRED.COND");
const GOLDEN_COVE: BranchEvent = intel(0x11c4, 125, "BR_INST_RETIRED.COND");
const LION_COVE: BranchEvent = intel(0x0001_0000_11c4, 125, "BR_INST_RETIRED.COND");
const ATOM: BranchEvent = intel(0x7ec4, 125, "BR_INST_RETIRED.COND");
const ZEN: BranchEvent = BranchEvent { config: 0xd1, skid: 10_000, unbounded: true, name: "ex_ret_cond" };

const fn intel(config: u64, skid: u64, name: &'static str) -> BranchEvent {
    BranchEvent { config, skid, unbounded: false, name }
}

/// Models of Intel's family 6, with the event of their cores and, if they are hybrid, of their small cores.
const INTEL: [(&[u32], BranchEvent, Option<BranchEvent>); 6] = [
    (
        // Nehalem, Westmere, Sandy and Ivy Bridge, Haswell, Broadwell, Skylake, Cascade Lake, Kaby to Comet Lake.
        &[
            0x1a, 0x1e, 0x1f, 0x2e, 0x25, 0x2c, 0x2f, 0x2a, 0x2d, 0x3a, 0x3e, 0x3c, 0x3f, 0x45, 0x46, 0x3d,
            0x47, 0x4f, 0x56, 0x4e, 0x5e, 0x55, 0x8e, 0x9e, 0xa5, 0xa6,
        ],
        OLD_CORE,
        None,
    ),
    // Ice Lake, Tiger Lake, Rocket Lake.
    (&[0x7d, 0x7e, 0x6a, 0x6c, 0x8c, 0x8d, 0xa7], ICE_LAKE, None),
    // Sapphire, Emerald and Granite Rapids.
    (&[0x8f, 0xcf, 0xad, 0xae], GOLDEN_COVE, None),
    // Alder, Raptor and Meteor Lake.
    (&[0x97, 0x9a, 0xb7, 0xba, 0xbf, 0xaa, 0xac], GOLDEN_COVE, Some(ATOM)),
    // Lunar and Arrow Lake.
    (&[0xbd, 0xc5, 0xc6], LION_COVE, Some(ATOM)),
    // Silvermont, Airmont, Goldmont (Plus), Tremont, Gracemont, Sierra Forest.
    (&[0x37, 0x4a, 0x4d, 0x5a, 0x4c, 0x5c, 0x5f, 0x7a, 0x86, 0x96, 0x9c, 0xbe, 0xaf], ATOM, None),
];

/// The event for a CPU. `None`: the model is not known, or is known not to count exactly (AMD before Zen).
pub fn branch_event(cpu: &CpuModel, core: Core) -> Option<BranchEvent> {
    match (cpu.vendor.as_str(), cpu.family) {
        ("GenuineIntel", 6) => {
            let (_, big, small) = INTEL.iter().find(|(models, ..)| models.contains(&cpu.model))?;
            match core {
                Core::Big => Some(*big),
                Core::Small => *small,
            }
        }
        ("AuthenticAMD", 0x17 | 0x19 | 0x1a) if core == Core::Big => Some(ZEN),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(vendor: &str, family: u32, model: u32, core: Core) -> Option<u64> {
        let cpu = CpuModel { vendor: vendor.into(), family, model };
        branch_event(&cpu, core).map(|event| event.config)
    }

    #[test]
    fn each_model_has_the_encoding_of_its_core() {
        assert_eq!(of("GenuineIntel", 6, 0x55, Core::Big), Some(0x01c4));
        assert_eq!(of("GenuineIntel", 6, 0x6a, Core::Big), Some(0x11c4));
        assert_eq!(of("GenuineIntel", 6, 0x97, Core::Small), Some(0x7ec4));
        assert_eq!(of("GenuineIntel", 6, 0xc6, Core::Big), Some(0x1_0000_11c4));
        assert_eq!(of("AuthenticAMD", 0x19, 0x11, Core::Big), Some(0xd1));
    }

    #[test]
    fn unknown_models_are_refused() {
        for (vendor, family, model) in [
            ("GenuineIntel", 6, 0x0f),
            ("GenuineIntel", 15, 3),
            ("AuthenticAMD", 0x15, 2),
            ("Other", 6, 0x55),
        ] {
            assert_eq!(of(vendor, family, model, Core::Big), None);
        }
        assert_eq!(of("GenuineIntel", 6, 0x6a, Core::Small), None);
    }

    #[test]
    fn no_model_is_listed_twice() {
        let mut all: Vec<u32> = INTEL.iter().flat_map(|(models, ..)| models.iter().copied()).collect();
        all.sort_unstable();
        let count = all.len();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
