import time, torch, mmap, sys
from loramux_worker.adapters import host_memory as h
torch.cuda.init(); torch.zeros(1,device='cuda')
print(open('/sys/kernel/mm/transparent_hugepage/enabled').read().strip())
n=42*10**6
dst=torch.empty(n,dtype=torch.bfloat16,device='cuda')
def once(huge):
    m=h._PinnedMapping(-1,2*n)
    if huge: m.madvise(mmap.MADV_HUGEPAGE)
    r=torch.frombuffer(m,dtype=torch.bfloat16)
    t=time.perf_counter(); m.register(r.data_ptr()); t1=time.perf_counter()
    r.fill_(1); t2=time.perf_counter()
    dst.copy_(r,non_blocking=True); torch.cuda.synchronize(); t3=time.perf_counter()
    dst.copy_(r,non_blocking=True); torch.cuda.synchronize(); t4=time.perf_counter()
    del r, m; t5=time.perf_counter()
    return [round(1e3*x,2) for x in (t1-t,t2-t1,t3-t2,t4-t3,t5-t4)]
for huge in (0,1,0,1): print('huge',huge,'register, fill, copy, copy again, free ms',once(huge))
