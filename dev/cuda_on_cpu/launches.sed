s/([A-Za-z_]([A-Za-z_0-9]|::)*(<[^<>]*>)?)<<<(([^>]|>{1,2}[^>])*)>>> *\(/cuda_on_cpu::Launch("\1", \4).of(\1)(/g
s/extern __shared__ (__align__\([0-9]+\) )?(.*[^A-Za-z_0-9])([A-Za-z_0-9]+)\[\];/\2*\3 = (\2*)cuda_on_cpu::dynamic_shared();/
s/__shared__ (__align__\([0-9]+\) )?([^;,=]* )([A-Za-z_0-9]+)((\[[^],;]*\])*);/auto \&\3 = cuda_on_cpu::static_shared<\2\4>([] {});/
s/#pragma unroll.*$//
