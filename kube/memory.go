package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// gcPercent trades CPU, of which an idle API has plenty, for memory: the heap of
	// 100 to 200 MB grows by half, not by its whole, between collections.
	gcPercent = 50
	// spare is what may be held beyond what lives. The start and every burst of new
	// CRDs leave more behind, which without allocations nobody would collect.
	spare       = 32 << 20
	returnEvery = 20 * time.Second
)

// limitMemory sets the collector's pace, where the environment doesn't.
func limitMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
}

// returnMemory gives memory back to the system after bursts, until ctx ends.
func returnMemory(ctx context.Context) {
	samples := []metrics.Sample{
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/heap/unused:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
		{Name: "/gc/heap/live:bytes"},
	}
	// What a full collection could not give back: fragments, which are not worth another.
	var stuck uint64
	held := func() uint64 {
		metrics.Read(samples)
		sum := samples[0].Value.Uint64() + samples[1].Value.Uint64() + samples[2].Value.Uint64()
		return sum - min(sum, samples[3].Value.Uint64())
	}
	tick := time.NewTicker(returnEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if held() > stuck+spare {
			debug.FreeOSMemory()
			stuck = held()
		}
	}
}
